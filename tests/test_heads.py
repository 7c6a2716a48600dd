import pytest
import torch

from components.heads import CNNHead, LinearHead, ViTHead

HEADS = {
    "vit": lambda: ViTHead(4),
    "cnn2": lambda: CNNHead(4, depth=2),
    "cnn3": lambda: CNNHead(4, depth=3),
    "cnn4": lambda: CNNHead(4),
    "cnn5": lambda: CNNHead(4, depth=5),
    "linear": lambda: LinearHead(4),
}
# method: the paper's section 3.2 as this project reads it; k = 2 and 4 are the authors' own counts.
PARAMETERS = {
    "vit": 3_510_144,
    "cnn2": 1_808_132,
    "cnn3": 5_610_500,
    "cnn4": 20_686_340,
    "cnn5": 80_722_436,
    "linear": 75_140,
}


@pytest.mark.parametrize("name", HEADS)
def test_output_is_four_times_the_embeddings_grid_with_one_channel_a_class(name):
    head = HEADS[name]()
    assert head(torch.randn(2, 256, 4, 3)).shape == (2, 4, 16, 12)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["vit", "cnn2", "linear"])
def test_logits_are_raw_and_every_parameter_learns(name):
    torch.manual_seed(0)
    head = HEADS[name]()
    logits = head(torch.randn(2, 256, 4, 4))
    assert (logits < 0).any()
    # Squares, as a plain sum would leave some gradients exactly zero.
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("name", ["vit", "cnn2", "linear"])
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


def test_vit_head_classes_and_images_do_not_mix():
    # Sharing the image side between classes and batching images must change nothing for either.
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
    untaught = ViTHead(4).tokens
    assert (untaught[0] - untaught[1]).std().item() == pytest.approx(2**0.5, rel=0.1)


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
