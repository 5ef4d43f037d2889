"""The packed form and the kernels, each instruction set against the reference in plain PyTorch."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import PackedError, WeightError
from pliant.runtime import library, packed_header, reference
from pliant.runtime.packed_linear import linear
from pliant.runtime.packed_matrix import FORMATS, GROUPS, header, pack, room, unpack, verify

needs_kernels = pytest.mark.skipif(library.library() is None, reason=library.state())
SHAPES = ((16, 128), (64, 256), (33, 131), (5, 7), (48, 576), (1, 1), (100, 300))


@pytest.fixture(params=library.available() or ["torch"])
def isa(request):
    """Every instruction set that runs here, emulated ones among them; none where there are no kernels."""
    if library.library() is None:
        yield "torch"
        return
    before = library.isa()
    library.choose(request.param)
    yield request.param
    library.choose(before)


def weights(rows, columns, sparsity=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator)
    return drawn * (torch.rand(rows, columns, generator=generator) >= sparsity)


def inputs(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def read_as(x, format, isa):
    """What a kernel makes of x: 8-bit codes for integers, bf16 where AMX multiplies bf16."""
    if format == "bf16" or isa == "torch":
        return x.bfloat16().double() if isa.startswith("amx") else x.double()
    slices = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = slices.abs().amax(2, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # a number over a tensor is not one division in torch
    codes = torch.where(largest > 1e-30, (slices * inverse).round(), 0)
    return (codes.double() * (largest / 127).double()).flatten(1)[:, : x.shape[1]]


@needs_kernels
def test_python_and_the_kernels_declare_the_same_header():
    """Every field is written where the native code says that it lies, and nowhere else."""
    words = library.library().pliant_header().decode().split()
    native = {name: (int(at), int(size)) for name, at, size in zip(*[iter(words)] * 3, strict=True)}
    unused, unused_size = native.pop("unused")
    assert [*native] == [*packed_header.RawHeader._fields]
    assert unused + unused_size == packed_header.SIZE
    empty = packed_header.RawHeader(b"", *[0] * 13)
    for name, (at, size) in native.items():
        value = b"\xff" * size
        of_field = value if name == "magic" else int.from_bytes(value) if size == 4 or name == "checksum" else -1
        written = empty._replace(**{name: of_field}).to_bytes()
        assert written == bytes(at) + value + bytes(packed_header.SIZE - at - size), name
        assert packed_header.RawHeader.read(written) == packed_header.RawHeader.read(empty.to_bytes())._replace(
            **{name: of_field}
        )
    start = packed_header.RawHeader.read(bytes(pack(torch.ones(1, 1), "int8").tolist()))
    assert (start.magic, start.version) == (packed_header.MAGIC, packed_header.VERSION)


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_unpacks_exactly_and_multiplies(isa, format, sparsity):
    for rows, columns in SHAPES:
        weight = weights(rows, columns, sparsity or 0.0)
        packed = pack(weight, format, sparse=sparsity is not None)
        verify(packed)
        dense = unpack(packed)
        assert torch.equal(dense, reference.unpack(packed))
        assert torch.equal(unpack(pack(dense, format, sparse=sparsity is not None)), dense)
        if format == "bf16":
            assert torch.equal(dense, weight.bfloat16().float())
        for batch in (1, 2, 3, 5, 17):
            x = inputs(batch, columns)
            expected = read_as(x, format, isa) @ dense.double().T
            size = read_as(x, format, isa).abs() @ dense.double().abs().T
            assert ((linear(x, packed, None, rows) - expected).abs() <= 2e-6 * size).all(), (rows, columns, batch)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("isa")
def test_codes_that_are_exact_give_exact_products(format, sparse):
    """x of whole numbers up to 127 with a 127 in every slice is its own codes: nothing is rounded anywhere."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-8, 8, (37, 160), generator=generator).float()
    weight[:, ::32] = -8.0
    x = torch.randint(-20, 21, (6, 160), generator=generator).float()
    x[:, ::32] = 127.0
    packed = pack(weight, format, sparse=sparse)
    exact = format != "int8" or torch.equal(unpack(packed), weight)
    dense = weight if exact else unpack(packed)
    torch.testing.assert_close(linear(x, packed, None, 37), x @ dense.T, rtol=2e-6, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("isa")
def test_a_row_is_the_same_alone_among_others_and_with_any_number_of_threads(format, sparse):
    packed = pack(weights(75, 401, 0.5), format, sparse=sparse)
    x = inputs(23, 401)
    together = linear(x, packed, None, 75)
    for row in range(len(x)):
        assert torch.equal(linear(x[row : row + 1], packed, None, 75)[0], together[row])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, packed, None, 75), together)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_vector_instruction_sets_agree_to_the_bit_on_integers(format):
    names = [name for name in library.available() if name != "scalar"]
    packed, x = pack(weights(50, 300, 0.4), format, sparse=True), inputs(7, 300)
    before = library.isa()
    try:
        found = []
        for name in names:
            library.choose(name)
            found.append(linear(x, packed, None, 50))
        library.choose("scalar")
        plain = linear(x, packed, None, 50)
    finally:
        library.choose(before)
    assert all(torch.equal(one, found[0]) for one in found[1:])
    torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    batch=st.integers(1, 20),
    sparsity=st.floats(0, 1),
    format=st.sampled_from(FORMATS),
    group=st.sampled_from(GROUPS),
    sparse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_agrees_with_the_reference(rows, columns, batch, sparsity, format, group, sparse, dtype):
    weight = weights(rows, columns, sparsity, seed=rows * 1000 + columns)
    packed = pack(weight, format, sparse=sparse, group=group)
    scales = None
    if format == "int4":  # two scales may be equally good
        scales = round_to_scales(packed)
    assert torch.equal(packed, reference.pack(weight, FORMATS.index(format), sparse, group, scales))
    bias = torch.linspace(-1, 1, rows)
    x = inputs(batch, columns).to(dtype)
    found = linear(x, packed, bias, rows)
    assert found.dtype == dtype
    assert found.shape == (batch, rows)
    dense = unpack(packed).double()
    expected = read_as(x, format, library.isa()) @ dense.T + bias.double()
    size = x.double().abs() @ dense.abs().T + 1
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((found.double() - expected).abs() <= tolerance * size + 1e-5).all()


def round_to_scales(packed):
    """The scales that a packed int4 matrix holds, shape ``(rows, groups)``."""
    found = header(packed)
    panels, groups = -(-found.rows // 16), -(-found.columns // found.group)
    stored = packed[128 : 128 + panels * groups * 32].clone().view(torch.bfloat16).view(panels, groups, 16)
    return stored.permute(0, 2, 1).reshape(panels * 16, groups)[: found.rows].float().contiguous()


def test_scales_that_are_given_are_used():
    weight = torch.tensor([[0.5, -0.25, 0.0, 0.75]])
    packed = pack(weight, "int4", scales=torch.tensor([[0.25]]))
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(unpack(pack(weight, "int8", scales=torch.tensor([0.25]))), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_take_a_bit_each(format):
    whole, half = (pack(weights(256, 1024, s), format, sparse=True) for s in (0.0, 0.5))
    bits, scales = {"bf16": (16, 0), "int8": (8, 0), "int4": (4, 16 / 128)}[format]
    for packed in (whole, half):  # int4 rounds some to zero, which are left out, too
        found = header(packed)
        assert found.bits == pytest.approx(bits * found.stored / (256 * 1024) + 1 + scales, abs=0.05)
    assert header(half).stored < 0.6 * header(whole).stored
    assert header(pack(weights(256, 1024, 1.0), format, sparse=True)).stored == 0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_one_number_that_is_none_makes_a_row_none(format, sparse):
    packed = pack(weights(20, 64), format, sparse=sparse)
    for none in (float("nan"), float("inf"), -float("inf")):
        x = inputs(3, 64)
        x[1, 5] = none
        found = linear(x, packed, None, 20)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()
    assert torch.equal(linear(torch.zeros(1, 64), packed, None, 20), torch.zeros(1, 20))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_damaged_is_refused(format, sparse):
    packed = pack(weights(40, 200, 0.5), format, sparse=sparse)
    for place in [0, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, *range(130, packed.numel(), 97)]:
        broken = packed.clone()
        broken[place] ^= 0x41
        with pytest.raises(PackedError):
            verify(broken)
    for size in (0, 10, 127, 128, packed.numel() // 2, packed.numel() - 1):
        with pytest.raises(PackedError):
            verify(packed[:size].clone())
    with pytest.raises(PackedError):
        verify(torch.cat([packed, packed[:64]]))


@needs_kernels
def test_what_a_header_says_is_looked_at_before_any_kernel_runs():
    """Also where nobody verified: places outside of the tensor, sizes that are none."""
    packed = pack(weights(40, 200, 0.5), "int8", sparse=True)
    for at, value in ((24, 1 << 40), (32, 0), (48, -64), (56, 1 << 50), (64, 1 << 50), (72, 1 << 50), (80, 1 << 50)):
        broken = packed.clone()
        broken[at : at + 8] = torch.tensor([value]).view(torch.uint8)
        with pytest.raises(PackedError):
            linear(torch.zeros(1, 200), broken, None, 40)


def test_another_size_or_kind_is_refused():
    packed = pack(weights(40, 200), "int8")
    if library.library() is not None:
        with pytest.raises(PackedError, match="40 outputs of 200 inputs, not 40 of 100"):
            linear(torch.zeros(1, 100), packed, None, 40)
    with pytest.raises(PackedError, match="unknown format 'int3'; choose from: bf16, int8, int4"):
        pack(weights(4, 4), "int3")
    with pytest.raises(PackedError, match="group must be one of 32, 64, 128; not 16"):
        pack(weights(4, 4), "int4", group=16)
    with pytest.raises(PackedError, match="only a matrix with elements can be packed"):
        pack(torch.zeros(3), "int8")
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        pack(torch.tensor([[1.0, float("inf")]]), "int8")
    with pytest.raises(PackedError, match="must be a tensor of at least 128 bytes"):
        header(torch.zeros(200))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_where_there_is_a_compiler_there_are_kernels():
    """The tests that need them would all be skipped."""
    assert library.library() is not None, library.state()
    assert {"scalar", "avx512-emulated", "amx-emulated"} <= set(library.available())


@needs_kernels
def test_instruction_sets_are_chosen_by_name():
    with pytest.raises(ValueError, match="unknown instruction set 'mmx' on this machine; choose from: "):
        library.choose("mmx")
    assert library.isa() in library.state()


@needs_kernels
def test_a_child_process_computes_too():
    """The threads of the pool stay with the parent."""
    program = """
import os, torch
from pliant.runtime.packed_linear import linear
from pliant.runtime.packed_matrix import pack
torch.set_num_threads(4)
packed, x = pack(torch.randn(512, 256), "int8"), torch.randn(3, 256)
before = linear(x, packed, None, 512)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(linear(x, packed, None, 512), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


@needs_kernels
def test_several_threads_of_a_program_may_call_at_once():
    from concurrent.futures import ThreadPoolExecutor

    packed, x = pack(weights(256, 256), "int4"), inputs(4, 256)
    expected = linear(x, packed, None, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: linear(x, packed, None, 256), range(200)):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


def test_room_is_given_back():
    held = room(5 << 20)
    assert held.numel() == 5 << 20
    view = held[100:200].fill_(7)
    del held
    assert int(view.sum()) == 700


def test_without_a_library_everything_is_computed_in_pytorch():
    program = """
import torch
from pliant.runtime import library
from pliant.runtime.packed_linear import Packed
assert library.library() is None and library.isa() == "torch" and library.available() == []
assert "PLIANT_LIBRARY is empty" in library.state()
layer = torch.nn.Linear(70, 30)
packed = Packed.of(layer, "int4", sparse=True)
x = torch.randn(3, 70)
dense = packed.dense()
assert torch.allclose(packed(x), dense(x), atol=1e-6)
packed.settle()
"""
    environment = {**os.environ, "PLIANT_LIBRARY": ""}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "said"), [("scalar", ""), ("avx1024", "PLIANT_ISA names 'avx1024', which this machine does not have")]
)
def test_the_environment_chooses_kernels_or_is_told_that_it_cannot(name, said):
    program = "from pliant.runtime import library; print(library.isa())"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PLIANT_ISA": name},
    )
    assert (ran.stdout.strip() == "scalar") == (name == "scalar")
    assert said in ran.stderr
    assert bool(ran.stderr) == bool(said)


def test_a_library_of_another_version_is_not_used(monkeypatch):
    class Other:
        def __getattr__(self, name):
            return type("Function", (), {"__call__": lambda _self, *_: 999})()

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    monkeypatch.setenv("PLIANT_LIBRARY", "somewhere.so")
    library._load.cache_clear()
    try:
        loaded, why = library._load()
        assert loaded is None
        assert "another version" in why
    finally:
        library._load.cache_clear()
