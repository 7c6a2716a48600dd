"""Purpose, Dice and relative time of the bundles that come with a trained model."""

# purpose; mean Dice in percent on real hearts without a label, as in docs/results.md; seconds on a CPU relative to the
# fastest
WORTH = {
    "linearhead_acdc": ("the quickest, to begin with and to train while one labels", 87.3, 1.0),
    "cnnhead_acdc": ("a larger head on the same encoder, to compare with", 86.7, 2.2),
    "deeplabhead_acdc": ("a head that sees further, for encoders that have not seen hearts", 87.1, 1.2),
    "autosam_acdc": ("SAM's mask decoder on the same encoder, as in the paper", 87.1, 2.5),
    "unet_acdc": ("the best without a label, and the one that gains most from labelled patients", 89.0, 1.1),
}
