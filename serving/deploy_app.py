"""A bundle as an application of MONAI Deploy: it segments a DICOM series and writes the labels as DICOM SEG.

Run it inside the folder of a bundle with `models/model.ts`, in an environment with `monai-deploy-app-sdk`:
`python <repository>/serving/deploy_app.py --input DICOM_FOLDER --output FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)
from pydicom.sr.codedict import codes

MR_SERIES = json.dumps({"selections": [{"name": "MR", "conditions": {"Modality": "MR"}}]})


class BundleApp(Application):
    """Segments the first MR series of a folder with a bundle.

    Args:
        bundle: the bundle's folder, which must be the working directory, since the paths in its configs begin there.
        input_dir: folder with the series' files.
        output_dir: where the DICOM SEG file is written, made if missing.
    """

    def __init__(self, bundle: Path, input_dir: Path, output_dir: Path) -> None:
        self.bundle, self.input_dir, self.output_dir = bundle, input_dir, output_dir
        super().__init__()

    def compose(self) -> None:
        """Connect MONAI Deploy's operators: load, select, stack, segment, write."""
        metadata = json.loads((self.bundle / "configs/metadata.json").read_text())
        classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        segments = [
            SegmentDescription(
                segment_label=name,
                segmented_property_category=codes.SCT.AnatomicalStructure,
                segmented_property_type=codes.SCT.Heart,
                algorithm_name=metadata["name"][:64],  # as many characters as DICOM allows
                algorithm_version=metadata["version"],
            )
            for _, name in sorted(classes.items(), key=lambda item: int(item[0]))[1:]
        ]
        context = AppContext({})
        context.models = None  # else a folder `models` below the working directory is used as the model
        load = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=self.input_dir, name="load")
        select = DICOMSeriesSelectorOperator(self, rules=MR_SERIES, name="select")
        stack = DICOMSeriesToVolumeOperator(self, name="stack")
        segment = MonaiBundleInferenceOperator(
            self,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            app_context=context,
            bundle_path=self.bundle,
            bundle_config_names=BundleConfigNames(config_names=["inference", "inference_deploy"]),
            name="segment",
        )
        write = DICOMSegmentationWriterOperator(
            self, segment_descriptions=segments, output_folder=self.output_dir, name="write"
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, stack, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(stack, segment, {("image", "image")})
        self.add_flow(segment, write, {("pred", "seg_image")})
        self.add_flow(select, write, {("study_selected_series_list", "study_selected_series_list")})


def main() -> None:
    """Run the application on a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="folder with the files of an MR series")
    parser.add_argument("--output", type=Path, required=True, help="folder for the DICOM SEG file")
    options = parser.parse_args()
    BundleApp(Path.cwd(), options.input.resolve(), options.output.resolve()).run()


if __name__ == "__main__":
    main()
