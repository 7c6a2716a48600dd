"""What the bundles that come with a trained model are worth beside each other."""

# purpose; mean Dice in percent on real hearts without a label, as in docs/results.md; seconds on a CPU relative to the
# fastest
WORTH = {
    "linearhead_acdc": ("the quickest, to begin with and to train while one labels", 86.1, 1.0),
    "cnnhead_acdc": ("a larger head on the same encoder, to compare with", 85.9, 2.2),
    "deeplabhead_acdc": ("a head that sees further, for encoders that have not seen hearts", 85.9, 1.2),
    "autosam_acdc": ("SAM's mask decoder on the same encoder, the best without a label, by a little", 86.3, 2.5),
    "unet_acdc": ("the one that gains most from labelled patients", 86.2, 1.1),
}
