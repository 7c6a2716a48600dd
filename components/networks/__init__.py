"""Networks from images to logits: heads on SAM's encoder, and the baselines they are compared with."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "box_prompted_sam": ["BoxPromptedSam"],
        "click_head": ["ClickHead"],
        "click_networks": ["click_corrector", "click_encoder"],
        "contrastive": ["ContrastiveUNet", "TwoViews"],
        "heads": ["CNNHead", "DeepLabHead", "LinearHead", "ViTHead"],
        "onnx_network": ["OnnxNetwork"],
        "prompt_free_sam": ["PromptFreeSam"],
        "trained_with": ["find_model", "resolve_settings"],
        "unet": ["GreyUNet"],
    },
)
