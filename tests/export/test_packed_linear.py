"""Products in oneDNN's own order: what a file holds is the plain matrix, and what is computed is `F.linear`."""

import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.torch_programs.products import PackedLinear

SHAPES = [(1, 1), (5, 3), (48, 33), (160, 48), (7, 256)]
shapes = pytest.mark.parametrize(("rows", "columns"), SHAPES)
inputs = pytest.mark.parametrize("leading", [(1,), (3,), (17,), (2, 1), (2, 5), (0,)], ids=str)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scripted(weight: Tensor, bias: Tensor | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(PackedLinear(weight, bias))


def saved(module: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(data))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_packed_is_given_back_bit_for_bit(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = random(rows, columns, dtype=dtype)
    weight.view(-1)[0] = -0.0
    weight.view(-1)[-1] = torch.nan
    module = loaded(saved(scripted(weight)))
    assert module.is_packed, "or there is nothing to give back"
    assert module.packed.layout == torch._mkldnn
    assert torch.equal(bits(module.stored()), bits(weight))


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_file_of_what_was_loaded_holds_the_same(rows: int, columns: int, dtype: torch.dtype) -> None:
    once = saved(scripted(random(rows, columns, dtype=dtype), random(rows, seed=1, dtype=dtype)))
    twice = saved(loaded(once))
    first, second = loaded(once), loaded(twice)
    assert torch.equal(bits(first.stored()), bits(second.stored()))
    assert torch.equal(bits(first.bias), bits(second.bias))
    assert abs(len(once) - len(twice)) < 256


@shapes
@inputs
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_product_is_the_plain_one(rows: int, columns: int, leading: tuple[int, ...], biased: bool) -> None:
    """Within what float32 may round sums of this many products, in whatever order."""
    weight, bias = random(rows, columns), random(rows, seed=1) if biased else None
    module, x = loaded(saved(scripted(weight, bias))), random(*leading, columns, seed=2)
    result = module(x)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert module.is_packed
    assert result.shape == (*leading, rows)
    assert result.dtype == torch.float32
    assert bool(((result.double() - exact).abs() <= (columns + 2) * 2**-23 * size).all())


@inputs
def test_bfloat16_is_rounded_once(leading: tuple[int, ...]) -> None:
    weight, bias, x = random(48, 33), random(48, seed=1), random(*leading, 33, seed=2)
    weight, bias, x = weight.bfloat16(), bias.bfloat16(), x.bfloat16()
    module = loaded(saved(scripted(weight, bias)))
    result = module(x)
    assert module.is_packed
    assert result.dtype == torch.bfloat16
    exact, size = F.linear(x.double(), weight.double(), bias.double()), F.linear(x.abs(), weight.abs(), bias.abs())
    assert bool(((result.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-14 * size.double()).all())


@inputs
@pytest.mark.parametrize("biased", [False, True])
def test_float16_stays_as_it_is(leading: tuple[int, ...], biased: bool) -> None:
    weight, bias = random(48, 33).half(), random(48, seed=1).half() if biased else None
    module, x = loaded(saved(scripted(weight, bias))), random(*leading, 33, seed=2).half()
    assert not module.is_packed
    assert module.packed.numel() == 0
    assert torch.equal(module.stored(), weight)
    assert torch.equal(module(x), F.linear(x, weight, bias))


def test_nothing_is_packed_before_it_is_saved() -> None:
    weight, x = random(5, 3), random(2, 3, seed=1)
    module = scripted(weight)
    assert not module.is_packed
    assert torch.equal(module(x), F.linear(x, weight))


def test_a_loaded_module_keeps_no_plain_copy_beside_the_packed_one() -> None:
    module = loaded(saved(scripted(random(64, 64))))
    assert module.weight.numel() == 0
    assert module.packed.shape == (64, 64)


class Tied(nn.Module):
    """An embedding whose matrix is that of a product, too."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weight)
        self.product = scripted(self.embedding.weight.data)

    def forward(self, ids: Tensor) -> Tensor:
        product: Tensor = self.product(self.embedding(ids))
        return product


def test_a_tied_matrix_is_in_the_file_once() -> None:
    weight, ids = random(500, 64), torch.tensor([[1, 499]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = saved(torch.jit.trace(Tied(weight), (ids,)))
    matrix = weight.numel() * 4
    assert matrix < len(data) < 1.5 * matrix
    torch.testing.assert_close(loaded(data)(ids), F.linear(weight[ids], weight))
