"""OHIF in a headless Chromium, as a person uses it: a study, a bundle's labels, clicks that correct them."""

import json
import re
from collections.abc import Iterator

import nibabel as nib
import numpy as np
import pydicom
import pytest
from label_server import Client, served
from test_page import CHROMIUM
from test_serving_dicom import orthanc, segments_of, series_of, study_of, write_series  # noqa: F401 - a fixture

from components.base.masks import innermost_pixel, largest_piece

CLASSES = ["background", "rv", "myo", "lv"]
SOFTWARE_GPU = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
IS_LOADED = """() => {
    const viewports = window.cornerstone?.getRenderingEngines()[0]?.getVolumeViewports() ?? [];
    return viewports.length === 3 && viewports.every(one => one.getImageData());
}"""
IS_CONNECTED = """() => {
    const service = services.segmentationService;
    return service.getSegmentations().length === 1 && service.getLabelmapVolume('1');
}"""
SHOWN = """() => {
    const service = services.segmentationService, volume = service.getLabelmapVolume('1');
    const segments = Object.values(service.getSegmentations()[0].config.segments);
    const names = Object.fromEntries(segments.map(one => [one.segmentIndex, one.label]));
    return [volume.dimensions, names, Array.from(volume.voxelManager.getCompleteScalarDataArray())];
}"""
IS_POINTING = """() => cornerstoneTools.ToolGroupManager.getToolGroupForViewport('mpr-axial')
    .getActivePrimaryMouseButtonTool() === 'ProbeMONAILabel'"""
POINTS = "cornerstoneTools.annotation.state.getAllAnnotations().length"
PLACE_OF = """voxel => {
    const viewport = cornerstone.getRenderingEngines()[0].getVolumeViewports()[0];
    const place = viewport.getImageData().imageData.indexToWorld(voxel);
    const { focalPoint, position, viewPlaneNormal: normal } = viewport.getCamera();
    const away = normal.reduce((sum, one, axis) => sum + one * (place[axis] - focalPoint[axis]), 0);
    const moved = point => point.map((one, axis) => one + away * normal[axis]);
    viewport.setCamera({ focalPoint: moved(focalPoint), position: moved(position) });
    viewport.render();
    const [canvas, [x, y]] = [viewport.canvas.getBoundingClientRect(), viewport.worldToCanvas(place)];
    return [canvas.x + x, canvas.y + y];
}"""  # scrolls the first view to a voxel, and returns where on the page it is
SUBMIT = """async ([image, voxels]) => {
    const form = new FormData();
    form.append('params', JSON.stringify({}));
    form.append('label', new Blob([new Uint8Array(voxels)]), 'label.bin');
    return (await fetch(`/datastore/label?image=${image}`, { method: 'PUT', body: form })).status;
}"""  # as `save_label` of OHIF's client, which no button of this OHIF calls


class Viewer:
    """OHIF's page for one study, connected to the server."""

    def __init__(self, page, client: Client, study: str) -> None:
        self.page = page
        page.goto(f"{client.address}/ohif/monai-label?StudyInstanceUIDs={study}")
        page.fill("#monailabelServerURL", f"{client.address}/")
        page.wait_for_function(IS_LOADED)
        page.click("text=Confirm and Hide")
        page.click(".settingsTable button")
        page.wait_for_function(IS_CONNECTED)

    def run(self, what: str) -> dict:
        """Press Run of a panel, wait until the answer is shown, and return the settings that were sent."""
        with (
            self.page.expect_console_message(lambda one: one.text.startswith("updated the segmentation")),
            self.page.expect_request(lambda one: "/infer/" in one.url) as sent,
        ):
            self.page.click(f"[title='Run {what}']")
        return json.loads(re.search(r'name="params"\s+(.+?)\r\n', sent.value.post_data)[1])

    def click(self, class_name: str, *voxels: list[int]) -> None:
        """Choose a class in the panel of points, and click on voxels."""
        self.page.locator(".clickable-row", has=self.page.get_by_text(class_name, exact=True)).click()
        self.page.wait_for_function(IS_POINTING)
        for voxel in voxels:
            points = self.page.evaluate(POINTS)
            self.page.mouse.click(*self.page.evaluate(PLACE_OF, voxel))
            self.page.wait_for_function(f"{POINTS} > {points}")

    def shown(self) -> np.ndarray:
        """The labels that are shown, as indices of `CLASSES`, in the order of axes of a NIfTI file."""
        shape, names, voxels = self.page.evaluate(SHOWN)
        indices = np.zeros(256, dtype=np.uint8)
        for index, name in names.items():
            indices[int(index)] = CLASSES.index(name) or 255  # nothing may be labelled as background
        return indices[np.array(voxels)].reshape(shape, order="F")


@pytest.fixture
def page() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium at hand: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright at hand: pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *SOFTWARE_GPU])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def dice(labels: np.ndarray, truth: np.ndarray, index: int) -> float:
    return 2 * ((labels == index) & (truth == index)).sum() / ((labels == index).sum() + (truth == index).sum())


def largest_error(wrong: np.ndarray) -> list[int]:
    """A voxel in the middle of the largest connected part of a mask, of those within a slice."""
    pieces = [largest_piece(of_slice) for of_slice in np.moveaxis(wrong, 2, 0)]
    number = max(range(len(pieces)), key=lambda each: np.count_nonzero(pieces[each]))
    return [*innermost_pixel(pieces[number]), number]


@pytest.mark.slow
def test_clicks_in_ohif_correct_the_labels_that_it_shows(orthanc, label_python, page, tmp_path):  # noqa: F811
    case = write_series(orthanc, tmp_path, size_hw_d=(128, 128, 8), seed=1)
    truth = np.asarray(nib.load(case["label"]).dataobj)
    (series,) = series_of(orthanc, "MR")
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache")}
    with served(label_python, tmp_path, f"{orthanc}/dicom-web", "--bundle", "linearhead_acdc", **cache) as client:

        def answer(model: str, **clicks: list) -> np.ndarray:
            sent = client.form(f"/infer/{model}", clicks, image=series, output="image")
            (tmp_path / "answer.nii.gz").write_bytes(sent)
            return np.asarray(nib.load(tmp_path / "answer.nii.gz").dataobj)

        viewer = Viewer(page, client, study_of(orthanc))
        viewer.run("Segmentation")
        before = viewer.shown()
        assert np.array_equal(before, answer("linearhead_acdc"))

        page.click("text=Point Prompts")
        missed = largest_error((truth == 2) & (before != 2))
        viewer.click("myo", missed)
        sent = viewer.run("PointPrompts")
        clicks = {name: voxels for name, voxels in sent.items() if isinstance(voxels, list)}
        assert clicks == {"background": [], "myo": [missed]}
        corrected, better = viewer.shown(), answer("linearhead_acdc_clicks", **clicks)
        # OHIF draws a class that is clicked over itself and the background, and leaves others as they are
        assert np.array_equal(corrected, np.where(before % 2, before, np.where(better == 2, 2, 0)))
        assert dice(corrected, truth, 2) > dice(before, truth, 2)
        assert dice(better, truth, 2) > dice(before, truth, 2)

        spurious = largest_error((corrected == 2) & (truth == 0))
        viewer.click("background", spurious)
        sent = viewer.run("PointPrompts")
        clicks = {name: voxels for name, voxels in sent.items() if isinstance(voxels, list)}
        assert clicks == {"background": [spurious], "myo": [missed]}
        corrected, better = viewer.shown(), answer("linearhead_acdc_clicks", **clicks)
        assert corrected[tuple(spurious)] == 0
        assert np.array_equal(corrected, np.where(before % 2, before, np.where(better == 2, 2, 0)))

        label = np.ravel(corrected, order="F").tolist()
        assert page.evaluate(SUBMIT, [series, label]) == 200
        (stored,) = series_of(orthanc, "SEG")
        client.post("/train/linearhead_acdc", {"max_epochs": 1, "val_split": 0.0}, run_sync="true")
        (submitted,) = (tmp_path / "cache").rglob(f"{stored}/*.dcm")  # which the training has fetched
        segmented = pydicom.dcmread(submitted)
        assert segments_of(segmented) == ["rv", "myo", "lv"]
        assert segmented.pixel_array.sum() == (corrected > 0).sum()
