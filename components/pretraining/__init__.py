"""Training of the package's weights, on synthetic pictures only."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "click_practice": ["ClickPractice"],
        "export": ["ExportRecord", "export_model", "export_network"],
        "joint_head": ["JointHead", "predictions_of_all"],
        "optimization": ["GradientClipping", "parameter_groups"],
        "phantom_stream": ["PhantomStream", "phantom_stacks"],
        "record": ["TrainingRecord"],
        "shape_stream": ["ShapeStream", "shape_stacks"],
        "stream": ["StreamPosition"],
    },
)
