import copy
import hashlib
import logging
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import nn

from components.embeddings.cache import EmbeddingCache, EmbeddingCacheReport

SHAPE = (4, 8, 8)
N_BYTES = 512  # of 256 values in float16
FILE_BYTES = 128 + N_BYTES + 4  # NumPy's header, values, checksum
GB = 1e9


def embedding_of(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def key_of(n: int) -> bytes:
    return hashlib.sha256(bytes([n])).digest()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.npy"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("from_memory", [True, False])
def test_embedding_comes_back_rounded_to_the_storage_type(tmp_path, dtype, from_memory):
    cache = EmbeddingCache(str(tmp_path), dtype=dtype)
    key = cache.key("encoder", torch.zeros(3, 2, 2))
    assert cache.get(key) is None
    stored = cache.put(key, embedding_of(0))
    assert stored.dtype == getattr(torch, dtype)
    assert bits(stored) == bits(embedding_of(0).to(stored.dtype))
    if not from_memory:
        cache = EmbeddingCache(str(tmp_path), dtype=dtype)
    found = cache.get(key)
    assert found.shape == SHAPE
    assert found.dtype == stored.dtype
    assert bits(found) == bits(stored)


def test_entry_is_a_numpy_file(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    stored = cache.put(key_of(0), embedding_of(0))
    (path,) = entries(tmp_path)
    assert path.stat().st_size == FILE_BYTES
    assert np.array_equal(np.load(path), stored.numpy())


def test_key_depends_on_everything_that_an_embedding_depends_on(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    image = torch.zeros(3, 4, 4)
    third = image.clone()
    third[2, 3, 3] = 0.3
    nearly_third = third.clone()
    nearly_third[2, 3, 3] = 0.3 + 1e-7  # far below a grey value
    assert float(nearly_third[2, 3, 3]) != float(third[2, 3, 3])
    keys = [
        cache.key("encoder", image),
        cache.key("other encoder", image),
        EmbeddingCache(str(tmp_path), dtype="float32").key("encoder", image),
        cache.key("encoder", image.to(torch.float64)),
        cache.key("encoder", image.to(torch.int32)),  # the same bytes
        cache.key("encoder", image.view(3, 2, 8)),  # likewise
        cache.key("encoder", image[None]),  # likewise
        cache.key("encoder", -image),  # -0.0 equals 0.0, but not in its bytes
        cache.key("encoder", third),
        cache.key("encoder", nearly_third),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_every_pixel_changes_the_key(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    images = torch.eye(27).view(27, 3, 3, 3)  # one pixel set in each
    assert len({cache.key("encoder", image) for image in images}) == 27


def test_same_content_has_the_same_key_however_it_lies_in_memory(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    image = torch.rand(3, 4, 5)
    key = cache.key("encoder", image)
    assert key == cache.key("encoder", image.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert key == cache.key("encoder", image.clone().requires_grad_())
    assert key == cache.key("encoder", MetaTensor(image))
    assert key == EmbeddingCache(str(tmp_path / "other")).key("encoder", image)
    assert cache.key("encoder", image.bfloat16()) != key


def test_stored_embedding_is_a_plain_copy_that_trains_whatever_it_was_made_of(tmp_path):
    original = embedding_of(0)
    cache = EmbeddingCache(str(tmp_path), dtype="float32")
    stored = cache.put(key_of(0), original)
    original.zero_()
    assert torch.equal(stored, embedding_of(0))
    with torch.inference_mode():
        cache.put(key_of(1), MetaTensor(embedding_of(1)) * 2)
        read = EmbeddingCache(str(tmp_path), dtype="float32").get(key_of(1))
    for embedding in (cache.get(key_of(1)), read):
        assert type(embedding) is torch.Tensor
        weight = torch.ones(SHAPE, requires_grad=True)
        (weight * embedding).sum().backward()
        assert torch.equal(weight.grad, embedding_of(1) * 2)


def flip_bit(content: bytes, index: int, bit: int = 0) -> bytes:
    return content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]


# From the content of an entry's file and that of another one to the damaged content.
DAMAGES = {
    "bit flipped in the values": lambda content, _: flip_bit(content, 300),
    "truncated": lambda content, _: content[:-100],
    "half written": lambda content, _: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "longer": lambda content, _: content + b"\0",
    "empty": lambda *_: b"",
    "another embedding's file": lambda _, other: other,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entry_is_a_miss_and_is_replaced(tmp_path, caplog, kind):
    cache = EmbeddingCache(str(tmp_path))
    for n in range(2):
        cache.put(key_of(n), embedding_of(n))
    path, other = (next(p for p in entries(tmp_path) if p.stem == key_of(n).hex()) for n in range(2))
    path.write_bytes(DAMAGES[kind](path.read_bytes(), other.read_bytes()))
    fresh = EmbeddingCache(str(tmp_path))
    assert fresh.get(key_of(0)) is None
    assert f"cannot read {path}" in caplog.text
    assert (fresh.hits, fresh.misses) == (0, 1)
    fresh.put(key_of(0), embedding_of(5))
    assert bits(EmbeddingCache(str(tmp_path)).get(key_of(0))) == bits(embedding_of(5).half())
    assert bits(EmbeddingCache(str(tmp_path)).get(key_of(1))) == bits(embedding_of(1).half())


def test_no_flipped_bit_and_no_lost_byte_changes_an_embedding(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    cache = EmbeddingCache(str(tmp_path), memory_gb=0)
    stored = cache.put(key_of(0), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(flip_bit(content, index, index % 8))
        found = cache.get(key_of(0))
        assert found is None or (found.shape == stored.shape and bits(found) == bits(stored))
    for length in range(0, len(content), 8):
        path.write_bytes(content[:length])
        assert cache.get(key_of(0)) is None


def test_whole_entry_of_another_dtype_is_a_miss(tmp_path):
    EmbeddingCache(str(tmp_path)).put(key_of(0), embedding_of(0))
    assert EmbeddingCache(str(tmp_path), dtype="float32").get(key_of(0)) is None


def image(n: int) -> torch.Tensor:
    return torch.full((1, 2, 2), float(n))


def written_by(writer: int, n: int) -> torch.Tensor:
    return torch.randn(30_000, generator=torch.Generator().manual_seed(n)).half() + writer


def start_writers(cache: EmbeddingCache, numbers: range) -> list[int]:
    """Fork two processes that store different embeddings of the same images at once; return their ids.

    They exit with 0 unless a look-up finds something else than what either writes, or a message is logged.
    """
    children = []
    for writer in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.set_num_threads(1)  # those of OpenMP do not survive a fork
                logging.getLogger("components.embeddings.cache").addFilter(lambda _: os._exit(2))
                for n in numbers:
                    key = cache.key("encoder", image(n))
                    found = cache.get(key)
                    if found is None:
                        found = cache.put(key, written_by(writer, n))
                    assert any(torch.equal(found, written_by(other, n)) for other in (0, 1))
                    assert bits(cache.get(key)) == bits(found)
                os._exit(0)
            finally:
                os._exit(1)
    return children


def check_written(folder: Path, numbers: range) -> int:
    """Check all embeddings in a folder, and return how many there are."""
    cache = EmbeddingCache(str(folder))
    for n in numbers:
        found = cache.get(cache.key("encoder", image(n)))
        assert found is None or any(torch.equal(found, written_by(writer, n)) for writer in (0, 1))
    assert len(entries(folder)) == cache.hits
    return cache.hits


def test_killed_writers_leave_no_wrong_embedding(tmp_path, caplog):
    chance = random.Random(0)
    for n in range(0, 2000, 100):
        children = start_writers(EmbeddingCache(str(tmp_path)), range(n, n + 100))
        time.sleep(chance.uniform(0.01, 0.1))
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert {os.waitpid(child, 0)[1] for child in children} <= {0, signal.SIGKILL}
    assert check_written(tmp_path, range(2000)) > 20
    assert caplog.text == ""  # no file is damaged


def test_processes_forked_from_one_that_uses_the_cache_fill_it_at_once(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    cache.put(cache.key("encoder", image(0)), written_by(0, 0))
    assert [os.waitpid(child, 0)[1] for child in start_writers(cache, range(100))] == [0, 0]
    assert check_written(tmp_path, range(100)) == 100
    for n in range(100):
        assert cache.get(cache.key("encoder", image(n))) is not None


def test_slower_process_takes_over_what_the_faster_one_stored(tmp_path):
    faster, slower = EmbeddingCache(str(tmp_path)), EmbeddingCache(str(tmp_path))
    assert faster.get(key_of(0)) is None
    assert slower.get(key_of(0)) is None
    stored = faster.put(key_of(0), embedding_of(1))
    assert bits(slower.put(key_of(0), embedding_of(2))) == bits(stored)
    assert bits(slower.get(key_of(0))) == bits(stored)


def test_at_the_limit_nothing_more_is_admitted_and_earlier_entries_stay(tmp_path):
    cache = EmbeddingCache(str(tmp_path), limit_gb=2.5 * FILE_BYTES / GB, memory_gb=0)
    for n in range(4):
        assert bits(cache.put(key_of(n), embedding_of(n))) == bits(embedding_of(n).half())
    assert [path.stat().st_size for path in entries(tmp_path)] == [FILE_BYTES] * 2
    assert cache.refused == 2
    assert [cache.get(key_of(n)) is not None for n in range(4)] == [True, True, False, False]
    reopened = EmbeddingCache(str(tmp_path), limit_gb=2.5 * FILE_BYTES / GB)
    reopened.put(key_of(5), embedding_of(5))
    assert (reopened.refused, len(entries(tmp_path))) == (1, 2)


def test_damaged_entry_is_replaced_even_at_the_limit(tmp_path):
    limit_gb = FILE_BYTES / GB
    EmbeddingCache(str(tmp_path), limit_gb=limit_gb).put(key_of(0), embedding_of(0))
    (path,) = entries(tmp_path)
    path.write_bytes(flip_bit(path.read_bytes(), 300))
    cache = EmbeddingCache(str(tmp_path), limit_gb=limit_gb)
    cache.put(key_of(0), embedding_of(0))
    assert cache.refused == 0
    assert EmbeddingCache(str(tmp_path)).get(key_of(0)) is not None


def test_caches_sharing_a_folder_count_each_others_entries(tmp_path):
    limit_gb = 4 * FILE_BYTES / GB  # a 64th of it is less than one entry, so the folder is measured before every write
    first, second = (EmbeddingCache(str(tmp_path), limit_gb=limit_gb) for _ in range(2))
    for n in range(0, 10, 2):
        first.put(key_of(n), embedding_of(n))
        second.put(key_of(n + 1), embedding_of(n + 1))
    assert 4 <= len(entries(tmp_path)) <= 5  # at most one too many, if the last to write had not counted the other's
    assert first.refused + second.refused == 10 - len(entries(tmp_path))


def test_partial_file_of_a_killed_process_counts_towards_the_limit(tmp_path):
    (tmp_path / "00").mkdir()
    (tmp_path / "00" / "0000.partial-1").write_bytes(bytes(FILE_BYTES))
    cache = EmbeddingCache(str(tmp_path), limit_gb=2 * FILE_BYTES / GB)
    for n in range(2):
        cache.put(key_of(n), embedding_of(n))
    assert (cache.refused, len(entries(tmp_path))) == (1, 1)


def test_memory_is_limited_and_the_disk_holds_the_rest(tmp_path):
    cache = EmbeddingCache(str(tmp_path), memory_gb=2.5 * N_BYTES / GB)
    for n in range(4):
        cache.put(key_of(n), embedding_of(n))
    for path in entries(tmp_path):
        path.unlink()
    assert [cache.get(key_of(n)) is not None for n in range(4)] == [True, True, False, False]
    assert cache.refused == 0


def test_second_look_up_is_served_from_memory(tmp_path):
    EmbeddingCache(str(tmp_path)).put(key_of(0), embedding_of(0))
    cache = EmbeddingCache(str(tmp_path))
    found = cache.get(key_of(0))
    entries(tmp_path)[0].unlink()
    assert cache.get(key_of(0)) is found


def test_memory_serves_what_the_disk_has_no_room_for(tmp_path):
    cache = EmbeddingCache(str(tmp_path), limit_gb=0)
    cache.put(key_of(0), embedding_of(0))
    assert (cache.refused, entries(tmp_path)) == (1, [])
    assert bits(cache.get(key_of(0))) == bits(embedding_of(0).half())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copied_cache_finds_the_same_entries_and_counts_for_itself(tmp_path, through):
    cache = EmbeddingCache(str(tmp_path), limit_gb=3, memory_gb=2, dtype="float32")
    cache.get(key_of(0))
    cache.put(key_of(0), embedding_of(0))
    copied = through(cache)
    assert (copied.folder, copied.limit_gb, copied.memory_gb, copied.dtype) == (tmp_path, 3, 2, "float32")
    assert torch.equal(copied.get(key_of(0)), embedding_of(0))
    assert (copied.hits, copied.misses) == (1, 0)
    assert (cache.hits, cache.misses) == (0, 1)


def test_nothing_is_made_before_the_first_look_up(tmp_path):
    cache = EmbeddingCache(str(tmp_path / "cache"))
    cache.key("encoder", torch.zeros(1))
    assert "0 embeddings, 0.00 of 16 GB" in cache.describe()
    assert not (tmp_path / "cache").exists()
    cache.get(key_of(0))
    assert (tmp_path / "cache").is_dir()


def test_home_is_found_in_a_folder_that_no_shell_has_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EmbeddingCache("~/cache").folder == tmp_path / "cache"


def test_folder_that_cannot_be_made_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(str(tmp_path / "file" / "cache"))
    for use in (lambda: cache.get(key_of(0)), lambda: cache.put(key_of(0), embedding_of(0))):
        with pytest.raises(
            OSError, match=r"expected a folder that can be .* received .*file/cache .*--cache_dir .*'\$None'"
        ):
            use()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written_is_refused_with_a_remedy(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"expected a folder that can be .*--cache_dir .*'\$None'"):
            EmbeddingCache(str(tmp_path)).get(key_of(0))
    finally:
        tmp_path.chmod(0o700)


def test_disk_that_fills_up_during_a_run_does_not_end_it(tmp_path, monkeypatch, caplog):
    cache = EmbeddingCache(str(tmp_path), memory_gb=0)
    cache.get(key_of(0))

    write_bytes = Path.write_bytes

    def fill_up(path, content):
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    for n in range(2):
        assert bits(cache.put(key_of(n), embedding_of(n))) == bits(embedding_of(n).half())
    assert cache.refused == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert caplog.text.count("No space left on device") == 1


def test_folder_deleted_during_a_run_is_filled_anew(tmp_path):
    cache = EmbeddingCache(str(tmp_path / "cache"))
    cache.put(key_of(0), embedding_of(0))
    shutil.rmtree(tmp_path / "cache")
    cache.put(key_of(1), embedding_of(1))
    assert [path.stem for path in entries(tmp_path / "cache")] == [key_of(1).hex()]


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    large = torch.tensor([1.0, -70000.0])
    cache = EmbeddingCache(str(tmp_path))
    with pytest.raises(ValueError, match=r"float16's range of 65504, received values up to 70000: .*'float32'"):
        cache.put(key_of(0), large)
    assert cache.get(key_of(0)) is None
    assert torch.equal(EmbeddingCache(str(tmp_path), dtype="float32").put(key_of(0), large), large)
    assert float(cache.put(key_of(1), torch.tensor([65504.0]))) == 65504


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    cache = EmbeddingCache(str(tmp_path), dtype=dtype)
    with pytest.raises(ValueError, match=r"expected an embedding of finite values .* check the image"):
        cache.put(key_of(0), torch.tensor([1.0, value, 2.0]))
    assert cache.get(key_of(0)) is None


def test_unknown_dtype_is_refused_naming_both(tmp_path):
    with pytest.raises(ValueError, match="expected dtype float16 or float32, received 'bfloat16'"):
        EmbeddingCache(str(tmp_path), dtype="bfloat16")


class Encoder(nn.Module):
    def __init__(self, cache: EmbeddingCache | None) -> None:
        super().__init__()
        self.cache = cache


def reports(caplog) -> list[str]:
    """The messages that the cache has logged, without those of ignite."""
    return [record.getMessage() for record in caplog.records if record.name == "components.embeddings.cache"]


def test_report_logs_where_the_embeddings_are_and_what_the_run_made_of_them(tmp_path, caplog):
    cache = EmbeddingCache(str(tmp_path), limit_gb=3 * FILE_BYTES / GB, memory_gb=0)
    for n in (0, 1, 2, 3, 0, 1):  # four misses, of which three fit, and two hits
        if cache.get(key_of(n)) is None:
            cache.put(key_of(n), embedding_of(n))
    engine = Engine(lambda *_: None)
    EmbeddingCacheReport(nn.Sequential(nn.Linear(1, 1), Encoder(cache))).attach(engine)
    with caplog.at_level(logging.INFO, logger="components.embeddings.cache"):
        engine.run([0])
    (message,) = reports(caplog)
    assert message == (
        f"embedding cache {tmp_path}: 3 embeddings, 0.00 of 1.932e-06 GB; "
        "this run looked up 6, encoded 4, found no room for 1"
    )


def test_report_counts_in_units_of_10_to_the_9_bytes(tmp_path):
    cache = EmbeddingCache(str(tmp_path))
    cache.put(key_of(0), torch.zeros(5_000_000))  # 10 MB at 2 bytes
    assert cache.describe().endswith("1 embeddings, 0.01 of 16 GB; this run looked up 0, encoded 0")


def test_report_of_a_network_without_a_cache_logs_nothing(caplog):
    engine = Engine(lambda *_: None)
    EmbeddingCacheReport(nn.Sequential(Encoder(None), nn.Linear(1, 1))).attach(engine)
    with caplog.at_level(logging.INFO, logger="components.embeddings.cache"):
        engine.run([0])
    assert reports(caplog) == []
