"""Networks that correct single classes by clicks: SAM's promptable decoders, and the head on the shipped encoder."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from components.networks.click_corrected_sam import ClickCorrectedSam, ClickCorrectedSam2
from components.networks.click_head import ClickHead, click_marks
from components.networks.click_networks import click_corrector, click_encoder, has_own_corrector
from components.networks.corrector import ClickCorrector, against_rest
from components.pretrained import pretrained_file
from components.sam.encoder import SamEncoder
from components.sam.encoders import ENCODERS
from components.sam.sam2_encoder import SAM2_ARCHITECTURES

SIDE, SIZE = 48, 64  # of a slice as the network is shown it, and of the encoder's images
GRID = SIZE // 16
RV, MYO, LV = 1, 2, 3


@pytest.fixture(scope="module")
def corrector(sam_checkpoint) -> ClickCorrectedSam:
    return ClickCorrectedSam(sam_checkpoint, SIZE)


@pytest.fixture(params=["SAM", "SAM 2.1", "head"])
def any_corrector(request, embeddings) -> tuple[ClickCorrector, torch.Tensor]:
    """A network and embeddings of two slices for it."""
    if request.param == "SAM":
        return request.getfixturevalue("corrector"), embeddings
    if request.param == "SAM 2.1":
        return ClickCorrectedSam2(request.getfixturevalue("sam2_checkpoint"), SIZE), torch.randn(2, 336, 16, 16)
    return ClickHead().eval(), embeddings


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(2, 256, GRID, GRID, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def clicked(*points) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([point[:2] for point in points]), torch.tensor([point[2] for point in points])


def by_segment_anything(sam, embedding, prompt, points, signs) -> torch.Tensor:
    """What `SamPredictor.predict` does with its modules, whose own module needs torchvision."""
    sam = copy.deepcopy(sam)
    sam.image_encoder.img_size = SIZE
    sam.prompt_encoder.image_embedding_size, sam.prompt_encoder.input_image_size = (GRID, GRID), (SIZE, SIZE)
    scaled = np.asarray(points, float) * (SIZE / SIDE)  # as `ResizeLongestSide.apply_coords`
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(
            points=(torch.as_tensor(scaled, dtype=torch.float)[None], torch.as_tensor(signs, dtype=torch.int)[None]),
            boxes=None,
            masks=prompt,
        )
        low, _ = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return sam.postprocess_masks(low, (SIZE, SIZE), (SIDE, SIDE))[0, 0]


def test_a_corrected_class_has_the_logit_that_segment_anything_gives_it(corrector, sam_vit_b, embeddings, logits):
    points, signs = [[10.0, 30.5], [40.25, 3.0], [0.0, 47.0]], [1, 0, 1]
    so_far = against_rest(logits[0], LV)[None, None]
    prompt = F.interpolate(so_far, (4 * GRID, 4 * GRID), mode="bilinear", align_corners=False, antialias=True)
    expected = by_segment_anything(sam_vit_b, embeddings[0], prompt, points, signs)
    assert expected.std() > 1e-3
    given = {LV: (torch.tensor(points), torch.tensor(signs))}
    corrected = corrector(embeddings[:1], logits[:1], [given])[0]
    assert torch.allclose(against_rest(corrected, LV), expected, rtol=0, atol=1e-5)
    assert torch.allclose(corrected.softmax(0)[LV], expected.sigmoid(), rtol=0, atol=1e-5)


def test_the_prompt_of_a_mask_on_its_own_grid_is_the_mask(corrector, embeddings):
    seen = []
    handle = corrector.prompt_encoder.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given), with_kwargs=True
    )
    mask = torch.randn(4 * GRID, 4 * GRID)
    corrector(embeddings[:1], torch.stack([0 * mask, mask])[None], [{1: clicked((3.0, 2.0, 1))}])
    handle.remove()
    assert torch.allclose(seen[0]["masks"][0, 0], mask, rtol=0, atol=1e-5)
    assert seen[0]["points"][0].tolist() == [[[3.0 * SIZE / (4 * GRID), 2.0 * SIZE / (4 * GRID)]]]


def test_classes_and_slices_without_a_click_stay_bit_for_bit(any_corrector, logits):
    (corrector, embeddings), before = any_corrector, logits.clone()
    corrected = corrector(embeddings, logits, [{}, {MYO: clicked((20.0, 20.0, 1))}])
    assert torch.equal(logits, before)
    assert torch.equal(corrected[0], before[0])
    assert torch.equal(corrected[1, [0, RV, LV]], before[1, [0, RV, LV]])
    assert not torch.equal(corrected[1, MYO], before[1, MYO])


def test_of_two_corrected_classes_the_larger_logit_of_sam_wins(corrector, embeddings, logits, monkeypatch):
    of_sam = {RV: torch.full((SIDE, SIDE), 2.0), LV: torch.full((SIDE, SIDE), 3.0)}
    of_sam[LV][:, 10:] = 1.0
    masks = iter(of_sam.values())
    monkeypatch.setattr(corrector, "mask", lambda *_: next(masks))
    click = clicked((20.0, 20.0, 1))
    labels = corrector(embeddings[:1], logits[:1], [{RV: click, LV: click}])[0].argmax(0)
    assert (labels[:, :10] == LV).all()
    assert (labels[:, 10:] == RV).all()


def test_where_sam_takes_a_class_away_the_best_of_the_others_remains(corrector, embeddings, logits, monkeypatch):
    monkeypatch.setattr(corrector, "mask", lambda *_: torch.full((SIDE, SIDE), -9.0))
    logits[0, LV] += 20  # the slice is full of it
    labels = corrector(embeddings[:1], logits[:1], [{LV: clicked((20.0, 20.0, 0))}])[0].argmax(0)
    assert torch.equal(labels, logits[0, :LV].argmax(0))


def test_a_class_against_the_rest_has_the_odds_of_its_probability(logits):
    probability = logits[0].double().softmax(0)[MYO]
    assert torch.allclose(against_rest(logits[0].double(), MYO), probability.logit(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "has_file", "trainable", "said"),
    [
        ("general_unet", True, False, "the encoder was trained further than"),
        ("vit_tiny", False, False, "or a SAM or SAM 2.1 checkpoint: received the encoder vit_tiny, which has no file"),
        ("vit_tiny", True, "neck", "the encoder was trained further than"),
    ],
)
def test_encoders_whose_decoder_is_not_at_hand_are_refused(model_type, has_file, trainable, said, tiny_sam_checkpoint):
    encoder = SamEncoder(model_type, image_size=SIZE, trainable=trainable)
    with pytest.raises(ValueError, match=said):
        corrector = click_corrector(encoder, tiny_sam_checkpoint if has_file else None)
        corrector(None, None, [])  # an encoder with random weights is noticed here


def test_the_files_of_sam_and_sam_2_bring_their_own_corrector():
    own = {name for name in ENCODERS if has_own_corrector(name)}
    assert own == {"vit_b", "vit_l", "vit_h", "vit_t", "vit_tiny", *SAM2_ARCHITECTURES}


def test_the_corrector_of_a_sam_encoder_is_the_decoder_of_its_file(tiny_sam_checkpoint, sam_vit_b, embeddings, logits):
    encoder = SamEncoder("vit_tiny", tiny_sam_checkpoint, SIZE)
    corrector = click_corrector(encoder, tiny_sam_checkpoint)
    for name, value in sam_vit_b.mask_decoder.state_dict().items():
        assert torch.equal(corrector.mask_decoder.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in corrector.parameters())
    corrector(embeddings, logits, [{}, {LV: clicked((1.0, 1.0, 1))}])

    trained = SamEncoder("vit_tiny", tiny_sam_checkpoint, SIZE, trainable=True)
    with torch.no_grad():
        trained.image_encoder.neck[0].weight += 0.1
    encoder.load_state_dict(trained.state_dict())  # as that of a bundle whose encoder was trained along
    with pytest.raises(ValueError, match="give a bundle that was trained with --trainable_encoder False"):
        corrector(embeddings, logits, [{}, {}])


def test_clicks_are_drawn_where_they_are():
    marks = click_marks(torch.tensor([[10.0, 30.0], [40.0, 5.0]]), torch.tensor([1, 0]), (SIDE, SIDE))
    assert marks.shape == (3, SIDE, SIDE)
    assert [torch.nonzero(disc).float().mean(0).tolist() for disc in marks[:2]] == [[30, 10], [5, 40]]
    assert marks[2, 30, 10] > 0.9
    assert marks[2, 5, 40] < -0.9
    assert marks[:2].amax() == 1


def test_the_head_sees_slices_of_another_size_than_the_encoder(logits):
    torch.manual_seed(0)
    network, seen = ClickHead().eval(), []
    network.unet.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    corrected = network(torch.randn(1, 256, 24, 24), logits[:1], [{RV: clicked((10.0, 30.0, 1))}])
    assert corrected.shape == (1, 4, SIDE, SIDE)
    assert seen[0].shape[2:] == (48, 48)
    on_class = seen[0][0, -2]  # at half of the size that the encoder saw, twice the slice's
    assert torch.nonzero(on_class).float().mean(0).tolist() == pytest.approx([30, 10], abs=0.6)


@pytest.mark.parametrize(
    ("shipped", "file"), [("phantom_unet", "click_head.pt"), ("general_unet", "general_click_head.pt")]
)
def test_the_package_has_a_head_for_each_of_its_encoders(shipped, file):
    """Whatever the network's own encoder is, as long as SAM's decoder is not in its file."""
    trained = SamEncoder("general_unet", image_size=SIZE, trainable=True)
    encoder = click_encoder(shipped, crop_size=SIDE + 1, encoder=trained)
    assert (encoder.model_type, encoder.image_size, encoder.trainable) == (shipped, SIZE, False)
    network = click_corrector(encoder)
    assert isinstance(network, ClickHead)
    assert sum(weight.numel() for weight in network.parameters()) < 1e6
    assert not any(weight.requires_grad for weight in (*network.parameters(), *encoder.parameters()))
    for name, value in torch.load(pretrained_file(file), weights_only=True).items():
        assert torch.equal(network.state_dict()[name], value.float()), name
    network(torch.zeros(1, 256, 16, 16), torch.zeros(1, 2, SIZE, SIZE), [{1: clicked((9.0, 9.0, 1))}])


def test_a_network_on_sam_is_corrected_on_its_own_embeddings(tiny_sam_checkpoint):
    encoder = SamEncoder("vit_tiny", tiny_sam_checkpoint, SIZE)
    assert click_encoder("phantom_unet", crop_size=SIDE, encoder=encoder) is encoder
    with pytest.raises(ValueError, match="received volumes of another kind, on which they did not help; make"):
        click_encoder(None, crop_size=SIDE, encoder=SamEncoder("general_unet"))
    with pytest.raises(ValueError, match="no encoder 'vit_b' for clicks comes with the package: expected phantom_unet"):
        click_encoder("vit_b", crop_size=SIDE)


def test_only_changes_that_a_click_asks_for_are_taken(monkeypatch):
    """The network would add a square and take another one away; each has a click of the wrong or right sign."""
    torch.manual_seed(0)
    network = ClickHead().eval()
    before = torch.full((4, SIDE, SIDE), -4.0)
    before[0] = 4
    before[:, 5:15, 5:15] = torch.tensor([-4.0, -4, -4, 4])[:, None, None]
    changed = against_rest(before, LV).clone()
    changed[5:15, 5:15] = -9.0
    changed[30:40, 30:40] = 9.0
    monkeypatch.setattr(network, "masks", lambda *_: F.interpolate(changed[None, None], size=(64, 64))[0])
    embedding = torch.zeros(1, 256, 16, 16)

    def labels(*points):
        return network(embedding, before[None], [{LV: clicked(*points)}])[0].argmax(0)

    as_before = before.argmax(0)
    assert torch.equal(labels((10.0, 10.0, 1), (35.0, 35.0, 0), (22.0, 44.0, 1)), as_before)
    without = labels((10.0, 10.0, 0))
    assert not (without == LV).any()
    more = labels((35.0, 35.0, 1))
    assert torch.equal(more[:20], as_before[:20])
    assert (more[31:39, 31:39] == LV).all()
