import pytest
import torch

from components.networks.heads import CNNHead, DeepLabHead, LinearHead, ViTHead
from components.sam.segment_anything_import import import_from_segment_anything

sam_common = import_from_segment_anything("modeling.common")
sam_mask_decoder = import_from_segment_anything("modeling.mask_decoder")
sam_transformer = import_from_segment_anything("modeling.transformer")

HEADS = {
    "vit": lambda: ViTHead(4),
    "cnn2": lambda: CNNHead(4, depth=2),
    "cnn3": lambda: CNNHead(4, depth=3),
    "cnn4": lambda: CNNHead(4),
    "cnn5": lambda: CNNHead(4, depth=5),
    "deeplab": lambda: DeepLabHead(4),
    "linear": lambda: LinearHead(4),
}
# Counts of the heads as specified in paper section 3.2; those of k = 2 and 4 are also the authors' own.
PARAMETERS = {
    "vit": 3_510_144,
    "cnn2": 1_808_132,
    "cnn3": 5_610_500,
    "cnn4": 20_686_340,
    "cnn5": 80_722_436,
    "deeplab": 672_900,
    "linear": 75_140,
}


@pytest.mark.parametrize("name", HEADS)
def test_output_is_four_times_the_embeddings_grid_with_one_channel_a_class(name):
    head = HEADS[name]()
    assert head(torch.randn(2, 256, 4, 3)).shape == (2, 4, 16, 12)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["vit", "cnn2", "deeplab", "linear"])
def test_logits_are_raw_and_every_parameter_learns(name):
    torch.manual_seed(0)
    head = HEADS[name]()
    logits = head(torch.randn(2, 256, 4, 4))
    assert (logits < 0).any()
    # Squares, because some gradients of a plain sum are exactly zero.
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("name", ["vit", "cnn2", "deeplab", "linear"])
def test_scripted_head_equals_eager_at_every_batch_and_grid_size(name):
    head = HEADS[name]()
    scripted = torch.jit.script(head)
    for shape in ((1, 256, 4, 4), (3, 256, 5, 2)):
        embeddings = torch.randn(shape)
        torch.testing.assert_close(scripted(embeddings), head(embeddings))


def test_vit_head_with_one_class_and_no_noise_is_sams_decoder_without_prompts(sam_vit_b, sam_checkpoint):
    embeddings = torch.randn(1, 256, 64, 64)
    head = ViTHead(1, sam_checkpoint, token_noise=0.0)
    with torch.no_grad():
        sparse, dense = sam_vit_b.prompt_encoder(points=None, boxes=None, masks=None)
        expected, _ = sam_vit_b.mask_decoder(
            image_embeddings=embeddings,
            image_pe=sam_vit_b.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        received = head(embeddings)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def duplicated_decoder(head: ViTHead, embeddings: torch.Tensor) -> torch.Tensor:
    """The head's output as computed by SAM's own modules, on an image duplicated for each class."""
    sams = sam_transformer.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048).double()
    sams.load_state_dict(head.transformer.state_dict())
    upscaling = sam_mask_decoder.MaskDecoder(transformer_dim=256, transformer=sams).output_upscaling.double()
    upscaling.load_state_dict(head.output_upscaling.state_dict())
    # With the head's own parameters, so that they receive the gradients.
    for module, own in ((sams, head.transformer), (upscaling, head.output_upscaling)):
        for name, parameter in own.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, parameter)
    batch, classes = len(embeddings), head.out_channels
    height, width = embeddings.shape[2:]
    image = (embeddings + head.no_mask_embed.view(1, -1, 1, 1)).repeat_interleave(classes, 0)
    positions = head.positional_encoding(height, width).t().view(1, 256, height, width)
    tokens = head.tokens.repeat(batch, 1, 1)
    queries, keys = sams(image, positions.repeat(batch * classes, 1, 1, 1), tokens)
    features = upscaling(keys.transpose(1, 2).view(batch * classes, 256, height, width))
    masks = (head.hypernetwork(queries[:, 1]).unsqueeze(1) @ features.flatten(2)).view(-1, 4 * height, 4 * width)
    return masks.view(batch, classes, 4 * height, 4 * width)


def test_vit_head_equals_the_decoder_duplicated_for_each_class_with_all_gradients():
    torch.manual_seed(0)
    head = ViTHead(3).double()
    embeddings = torch.randn(2, 256, 4, 3, dtype=torch.float64, requires_grad=True)
    pairs = []
    for decode in (head, lambda x: duplicated_decoder(head, x)):
        head.zero_grad()
        embeddings.grad = None
        logits = decode(embeddings)
        logits.sin().sum().backward()
        gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
        pairs.append({"logits": logits.detach(), "embeddings": embeddings.grad.clone(), **gradients})
    received, expected = pairs
    assert len(expected) == 2 + len(list(head.parameters()))
    for name, value in expected.items():
        torch.testing.assert_close(received[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_linear_head_equals_convolutions_of_the_same_weights():
    torch.manual_seed(0)
    head = LinearHead(4).double()
    convolutions = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(256, 64, kernel_size=2, stride=2),
        sam_common.LayerNorm2d(64),
        torch.nn.GELU(),
        torch.nn.ConvTranspose2d(64, 32, kernel_size=2, stride=2),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 32, kernel_size=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 4, kernel_size=1),
    ).double()
    shapes = {name: value.shape for name, value in convolutions.state_dict().items()}
    convolutions.load_state_dict({name: value.view(shapes[name]) for name, value in head.state_dict().items()})
    embeddings = torch.randn(2, 256, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(head(embeddings), convolutions(embeddings))


@pytest.mark.parametrize("name", ["vit", "cnn2", "deeplab", "linear"])
def test_head_in_bf16_is_near_fp32(name):
    torch.manual_seed(0)
    head = HEADS[name]()
    embeddings = torch.randn(2, 256, 4, 4)
    expected = head(embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        received = head(embeddings)
    torch.testing.assert_close(received.float(), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


def test_vit_head_classes_and_images_do_not_mix():
    # Each class and image must have the logits that it has alone.
    torch.manual_seed(0)
    head = ViTHead(3, token_noise=0.5)
    embeddings = torch.randn(2, 256, 4, 4)
    together = head(embeddings)
    for index in range(3):
        alone = ViTHead(1)
        state = head.state_dict()
        state["tokens"] = state["tokens"][index : index + 1]
        alone.load_state_dict(state)
        for image in range(2):
            expected = alone(embeddings[image : image + 1])[0, 0]
            torch.testing.assert_close(together[image, index], expected, rtol=0, atol=1e-6)


def test_vit_head_token_noise_sets_classes_apart_the_same_way_every_time(sam_checkpoint):
    tokens = ViTHead(4, sam_checkpoint).tokens
    assert torch.equal(tokens, ViTHead(4, sam_checkpoint).tokens)
    assert all(not torch.equal(tokens[0], tokens[index]) for index in (1, 2, 3))
    silent = ViTHead(4, sam_checkpoint, token_noise=0.0).tokens
    assert torch.equal(silent[0], silent[3])
    assert (tokens - silent).std().item() == pytest.approx(0.02, rel=0.1)
    without_checkpoint = ViTHead(4).tokens
    assert (without_checkpoint[0] - without_checkpoint[1]).std().item() == pytest.approx(2**0.5, rel=0.1)


def test_vit_head_positions_and_no_mask_embedding_are_frozen_buffers():
    buffers = dict(ViTHead(2).named_buffers())
    assert {name: tuple(value.shape) for name, value in buffers.items()} == {
        "no_mask_embed": (1, 256),
        "frequencies": (2, 128),
    }


def test_vit_head_names_a_missing_decoder_key(sam_checkpoint, tmp_path):
    state = torch.load(sam_checkpoint, weights_only=True)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"missing: mask_decoder\.iou_token\.weight"):
        ViTHead(4, str(tmp_path / "broken.pth"))


def test_cnn_head_of_one_stage_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        CNNHead(4, depth=1)
