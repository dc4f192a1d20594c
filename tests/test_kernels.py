"""The benchmarks' table of kernels, read from a trace."""

import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("MemcpyD2D", "copies"),
        ("loop_convert_fusion_3", "fusions"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert kernels.kind_of(name) == kind


def test_the_table_adds_up_each_kind():
    found = [kernels.Kernel("fmha", "attention", 2, 30.0), kernels.Kernel("gemm", "products", 5, 8.5), kernels.Kernel("gemm2", "products", 1, 1.5)]
    assert kernels.by_kind(found) == {"attention": 30.0, "products": 10.0, "copies": 0, "fusions": 0}
    assert kernels.table(found, 42.0, rows=1).splitlines() == [
        "    30.00 ms      2 x  attention  fmha",
        "kernels 40.0 ms of 42.0: attention 30.0 ms, products 10.0 ms, copies 0.0 ms, fusions 0.0 ms",
    ]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="of a GPU there are kernels")
def test_a_trace_without_a_gpu_says_so(tmp_path):
    path = kernels.traced(lambda: jnp.ones(3) + 1, tmp_path / "traces", "sum")
    assert path == tmp_path / "traces" / "sum.xplane.pb" and path.stat().st_size
    assert kernels.table(*kernels.read_kernels(path)) == "the trace has no kernels of a GPU"
