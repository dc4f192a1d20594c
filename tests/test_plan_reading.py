"""What the plan reads from a compiled program: operations, bytes, collectives and memory, against what theory says of them."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from svdp_jax.plan import compiler, costs, hlo, targets


def compiled(function, *arguments) -> hlo.Module:
    return hlo.Module(jax.jit(function).lower(*arguments).compile().as_text())


def counted(module: hlo.Module) -> float:
    return sum(module.flops(where, op) * times for where, op, times in module.walk())


def test_products_count_two_for_each_multiplication():
    a, b = jnp.ones((6, 32, 40)), jnp.ones((6, 40, 24))
    assert counted(compiled(jnp.matmul, a, b)) == 2 * 6 * 32 * 40 * 24


def test_a_loop_counts_as_often_as_it_runs():
    weights = jnp.ones((7, 32, 32))
    looped = lambda x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
    assert counted(compiled(looped, jnp.ones((16, 32)))) == 7 * 2 * 16 * 32 * 32


def test_padding_of_a_convolution_is_no_work():
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    function = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert counted(compiled(function, x, kernel)) == 2 * (8 * 3 - 2) ** 2 * 3 * 5


KERNEL = """
ENTRY %main (q: bf16[2,384,3,64], k: bf16[2,256,3,64], v: bf16[2,256,3,64], bound: f32[1]) -> bf16[2,384,3,64] {
  %q = bf16[2,384,3,64]{3,2,1,0} parameter(0)
  %k = bf16[2,256,3,64]{3,2,1,0} parameter(1)
  %v = bf16[2,256,3,64]{3,2,1,0} parameter(2)
  %bound = f32[1]{0} parameter(3)
  ROOT %attention = bf16[2,384,3,64]{3,2,1,0} custom-call(%q, %k, %v, %bound), custom_call_target="mosaic_gpu_v2", api_version=API_VERSION_TYPED_FFI
}
"""


def test_our_kernel_is_two_products_of_all_queries_and_keys():
    assert counted(hlo.Module(KERNEL)) == 2 * (2 * 2 * 3 * 384 * 256 * 64)


def test_what_is_moved_is_what_goes_in_and_comes_out():
    module = compiled(lambda x, y: jnp.tanh(x) * y + 1, jnp.ones((64, 64)), jnp.ones((64, 64)))
    assert sum(module.moved(where, op) * times for where, op, times in module.walk()) == 3 * 64 * 64 * 4


FUSED = """
%fused (param_0: f32[8,64], param_1: f32[8,64]) -> f32[8,16] {
  %param_0 = f32[8,64]{1,0} parameter(0)
  %param_1 = f32[8,64]{1,0} parameter(1)
  %add.1 = f32[8,64]{1,0} add(%param_0, %param_1)
  ROOT %slice.1 = f32[8,16]{1,0} slice(%add.1), slice={[0:8], [0:16]}
}

ENTRY %main (a: f32[8,64], b: f32[8,64]) -> f32[8,16] {
  %a = f32[8,64]{1,0:T(8,128)} parameter(0)
  %b = f32[8,64]{1,0:T(8,128)} parameter(1)
  ROOT %fusion = f32[8,16]{1,0:T(8,128)} fusion(%a, %b), kind=kLoop, calls=%fused
}
"""


def test_of_an_array_that_is_sliced_in_a_fusion_the_slice_is_moved():
    module = hlo.Module(FUSED)
    ((where, op, times),) = module.walk()
    assert module.moved(where, op) == 3 * 8 * 16 * 4 and times == 1


FETCHED = """
%double (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %twice = f32[64,128]{1,0:T(8,128)S(1)} add(%x, %x)
}

ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = f32[64,128]{1,0:T(8,128)S(1)} fusion(%copy-done), kind=kLoop, calls=%double
  ROOT %copy = f32[64,128]{1,0:T(8,128)} copy(%fusion)
}
"""


def test_what_a_tpu_keeps_on_the_chip_is_fetched_once_and_put_back_once():
    module, array = hlo.Module(FETCHED), 64 * 128 * 4
    assert [module.moved(where, op) for where, op, _ in module.walk()] == [array + 4, 0, array]


SLICED = """
ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %dynamic-slice = f32[8,128]{1,0:T(8,128)S(1)} dynamic-slice(%a, %zero, %zero), dynamic_slice_sizes={8,128}
  %slice-start = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:128]}
  ROOT %update = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%a, %dynamic-slice, %zero, %zero)
}
"""


def test_of_an_array_that_is_sliced_onto_the_chip_the_slice_is_moved():
    module, part = hlo.Module(SLICED), 8 * 128 * 4
    assert [module.moved(where, op) for where, op, _ in module.walk()] == [part, part, part]


SLICES = """
%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %end = s32[] constant(8)
  %at = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%at, %end), direction=LT
}

%body (state.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %at.1 = s32[] get-tuple-element(%state.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%at.1, %one)
  %x = f32[4,8]{1,0} get-tuple-element(%state.1), index=1
  %token = token[] after-all()
  %send.1 = (f32[4,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  ROOT %again = (s32[], f32[4,8]{1,0}) tuple(%next, %x)
}

ENTRY %main (a: f32[4,8]) -> (s32[], f32[4,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %first = s32[] constant(1)
  %begin = s32[] copy(%first)
  %start = (s32[], f32[4,8]{1,0}) tuple(%begin, %a)
  ROOT %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_what_a_host_is_sent_for_other_slices_crosses_data_in_each_turn_that_is_left_of_a_loop():
    mesh, device = {"data": 2, "fsdp": 8}, targets.PLANNED["v5p"]
    (sent,) = costs.of(SLICES, mesh, device, groups=2).collectives
    assert sent == costs.Collective("all-reduce", ("data",), 2, "f32", 7 * 4 * 4 * 8, 7)
    seconds = costs.of(SLICES, mesh, device, groups=2).seconds["interconnect"]
    assert seconds == pytest.approx(sent.bytes / (device.network * 1e9)), "a ring of two sends it once"


CHAIN = """
%begin (share: bf16[4,8]) -> (bf16[4,8], bf16[32,8], u32[]) {
  %share = bf16[4,8]{1,0} parameter(0)
  %gather.1 = bf16[32,8]{1,0} all-gather(%share), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %started = (bf16[4,8]{1,0}, bf16[32,8]{1,0}, u32[]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (share.1: bf16[4,8], whole.1: bf16[32,8], a.1: bf16[16,64], b.1: bf16[64,16]) -> (bf16[16,16], bf16[4,8], bf16[32,8]) {
  %share.1 = bf16[4,8]{1,0} parameter(0)
  %whole.1 = bf16[32,8]{1,0} parameter(1)
  %a.1 = bf16[16,64]{1,0} parameter(2)
  %b.1 = bf16[64,16]{1,0} parameter(3)
  %dot.1 = bf16[16,16]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather.2 = bf16[32,8]{1,0} all-gather(%share.1), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %both = (bf16[16,16]{1,0}, bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%dot.1, %share.1, %gather.2)
}

ENTRY %main (share.2: bf16[4,8], a: bf16[16,64], b: bf16[64,16]) -> bf16[16,16] {
  %share.2 = bf16[4,8]{1,0} parameter(0)
  %a = bf16[16,64]{1,0} parameter(1)
  %b = bf16[64,16]{1,0} parameter(2)
  %start = (bf16[4,8]{1,0}, bf16[32,8]{1,0}, u32[]) fusion(%share.2), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %mine = bf16[4,8]{1,0} get-tuple-element(%start), index=0
  %whole = bf16[32,8]{1,0} get-tuple-element(%start), index=1
  %fusion = (bf16[16,16]{1,0}, bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%mine, %whole, %a, %b), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%beside
  ROOT %product = bf16[16,16]{1,0} get-tuple-element(%fusion), index=0
}
"""


def test_a_collective_that_goes_on_beside_a_product_is_one_and_the_product_moves_its_own_bytes():
    found = costs.of(CHAIN, {"fsdp": 8}, targets.PLANNED["v5e"])
    assert [(sent.kind, sent.bytes, sent.times) for sent in found.collectives] == [("all-gather", 32 * 8 * 2, 1)]
    assert found.flops == 2 * 16 * 16 * 64 and found.moved == 2 * (2 * 16 * 64 + 16 * 16)


@pytest.mark.parametrize("text", [SLICES, CHAIN])
def test_elements_of_tuples_are_the_same_without_operations_of_their_own(text):
    """As jax 0.11 writes them."""
    short, element = text, r"\n  %([\w.]+) = .* get-tuple-element\(%([\w.]+)\), index=(\d+)"
    for name, whole, index in re.findall(element, text):
        short = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{whole}#{index}", short)
    short = re.sub(element, "", short)
    assert "#" in short and short.count("get-tuple-element") < text.count("get-tuple-element")
    read = lambda text: costs.of(text, {"data": 2, "fsdp": 8}, targets.PLANNED["v5p"], groups=2)
    assert read(short) == read(text)


def lowered_step():
    """A loop whose first argument is given up for its result."""
    step = lambda x, weights: (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], weights.sum())
    return jax.jit(step, donate_argnums=0).lower(jnp.ones((16, 32)), jnp.ones((7, 32, 32)))


def test_a_program_without_machine_code_is_the_one_with_it(tmp_path):
    found, whole = compiler.optimise(lowered_step(), tmp_path), compiler.of_machine_code(lowered_step().compile())
    assert list(tmp_path.glob(f"*{compiler.REPORT}")), "it was read from what XLA wrote"
    assert (found.arguments, found.temporaries) == (whole.arguments, whole.temporaries) and found.arguments == 4 * (16 * 32 + 7 * 32 * 32)
    read = [costs.of(program.text, {"data": 1}, targets.PLANNED["h100"]) for program in (found, whole)]
    assert read[0] == read[1] and read[0].flops == 7 * 2 * 16 * 32 * 32


def test_a_compiler_that_writes_under_other_names_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "REPORT", "never-written.txt")
    assert compiler.optimise(lowered_step(), tmp_path).arguments == 4 * (16 * 32 + 7 * 32 * 32)


def test_what_the_compiler_complains_of_is_raised(tmp_path):
    def complain(options):
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"):
        compiler.optimise(SimpleNamespace(compile=complain), tmp_path)


PLACES = """BufferAssignment:
allocation 0: size 32, thread-local:
 value: <283 tuple.229{} @0> (size=32,offset=0): (f32[], s32[])
allocation 1: size 1000, parameter 6, shape |f32[13,192,9,1536]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 200, output shape is |(s32[], f32[13], /*index=5*/f32[13,9])|, maybe-live-out:
allocation 3: size 512, constant:
allocation 4: size 64, maybe-live-out:
allocation 5: size 8000, preallocated-temp:
allocation 6: size 192, color 2, preallocated-temp:
"""


def test_what_lies_in_a_devices_memory_is_known_from_the_compilers_account():
    assert compiler.places(PLACES) == (1000, 200 + 64 + 8000)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="nothing is marked ENTRY"):
        hlo.Module("HloModule nothing")


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", ("data", "tensor"), 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2,'axis_3'=2], device_ids=([2,2,2]T(0,2,1)) {'axis_2'}", ("tensor",), 2),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 8),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ("data",), 2),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(groups, axes, devices):
    op = hlo.Op("x", "all-reduce", (), (), f", {groups}, use_global_device_ids=true", False)
    assert hlo.axes_of(op, MESH) == (axes, devices)


def test_groups_that_cannot_be_read_are_not_guessed():
    op = hlo.Op("x", "all-reduce", (), (), ", replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, use_global_device_ids=true", False)
    with pytest.raises(ValueError, match="a form that is not known here"):
        hlo.axes_of(op, MESH)


def test_seconds_are_those_of_the_slowest_network_on_the_way():
    device = targets.DEVICES["v5e"]
    of = lambda kind, axes, devices, groups=1: costs._seconds(costs.Collective(kind, axes, devices, "bf16", 10**9, 1), device, groups)
    assert of("all-gather", ("fsdp",), 4) == pytest.approx(0.75 / device.link)
    assert of("all-reduce", ("fsdp",), 4) == pytest.approx(1.5 / device.link)
    assert of("all-reduce", ("data",), 2, groups=2) == pytest.approx(1 / device.network)
    assert of("all-reduce", ("fsdp",), 2, groups=2) == pytest.approx(1 / device.link), "fsdp stays within a slice"


MIXED = """
ENTRY %main (a: bf16[2,8], b: f32[4]) -> (bf16[16,8], f32[32]) {
  %a = bf16[2,8]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  ROOT %gathered = (bf16[16,8]{1,0}, f32[32]{0}) all-gather(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""


def test_a_collective_of_several_types_is_told_apart_by_type():
    found = costs.of(MIXED, {"fsdp": 8}, None).collectives
    assert {(one.kind, one.axes, one.dtype, one.bytes, one.times) for one in found} == {("all-gather", ("fsdp",), "bf16", 256, 1), ("all-gather", ("fsdp",), "f32", 128, 1)}
