// radixkv._core's part for attention. Tensors cross as addresses and strides, checked in radixkv/attention/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "attention/plan.hpp"
#include "base/error.hpp"
#include "python/objects.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_attention(nb::module_& m);

namespace {

using attention::AttentionPlan;
using attention::Cache;
using attention::DType;
using attention::LayerKV;
using attention::Options;
using attention::Rows;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  if (name == "float8_e4m3fn") return DType::f8;
  invalid("dtype is " + name + ": it must be float32, bfloat16, float16 or float8_e4m3fn");
}

// Rows of `heads` heads, one after the other.
Cache cache_at(std::uintptr_t address, const std::string& dtype, std::int32_t heads, std::int32_t dim, float scale,
               std::int64_t page_bytes) {
  const std::int64_t head = dim * attention::element_size(dtype_named(dtype));
  return Cache{reinterpret_cast<char*>(address), dtype_named(dtype), dim, scale, page_bytes, heads * head, head};
}

Rows rows_of(std::uintptr_t address, std::int64_t row_stride, std::int64_t head_stride) {
  return Rows{reinterpret_cast<const void*>(address), row_stride, head_stride};
}

// An AttentionPlan, called without the GIL.
class Plan {
 public:
  Plan(const std::vector<LayerKV>& layers, const std::string& dtype, std::int32_t num_pages, std::int32_t page_size,
       int num_threads, const std::string& isa)
      : plan_(layers, dtype_named(dtype), num_pages, page_size, num_threads, isa.c_str()) {}
  void plan(const PyTable& t) {
    const StepTable& table = t.table();
    const nb::gil_scoped_release release;
    plan_.plan(table);
  }

  void append(std::size_t layer, std::uintptr_t k, std::int64_t k_row, std::int64_t k_head, std::uintptr_t v,
              std::int64_t v_row, std::int64_t v_head) {
    const nb::gil_scoped_release release;
    plan_.append(layer, rows_of(k, k_row, k_head), rows_of(v, v_row, v_head));
  }

  void run(std::size_t layer, std::uintptr_t q, std::int64_t q_row, std::int64_t q_head, std::uintptr_t out,
           float sm_scale, std::int32_t window_left, float logits_soft_cap, std::int32_t attention_chunk,
           std::uintptr_t sinks) {
    const nb::gil_scoped_release release;
    plan_.run(layer, rows_of(q, q_row, q_head), reinterpret_cast<void*>(out),
              Options{sm_scale, window_left, logits_soft_cap, attention_chunk, reinterpret_cast<const float*>(sinks)});
  }

  PyCascade* cascade() {
    std::pair<StepTable, std::shared_ptr<const Cascade>> planned;
    {
      const nb::gil_scoped_release release;
      planned = plan_.planned();
    }
    return new PyCascade(std::move(planned.first), std::move(planned.second));
  }
  void set_costs(const CascadeCosts& costs) {
    const nb::gil_scoped_release release;
    plan_.set_costs(costs);
  }
  std::int64_t num_rows() const { return plan_.num_rows(); }
  std::string isa() const { return plan_.isa(); }
  int num_threads() const { return plan_.num_threads(); }
  void set_num_threads(int num_threads) {
    const nb::gil_scoped_release release;
    plan_.set_num_threads(num_threads);
  }

 private:
  AttentionPlan plan_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "isa", [] { return std::string(attention::kernel().isa); },
      "The instruction set that attention uses: the machine's best, or the environment's RADIXKV_ISA.");
  m.attr("CHUNK_KEYS") = attention::kChunkKeys;
  m.def("isas", &attention::supported_isas, "The instruction sets that this machine supports, best first.");

  nb::class_<LayerKV>(m, "LayerKV", "Where one layer's K and V pages lie; see radixkv.pool.LayerKV.")
      .def(
          "__init__",
          [](LayerKV* self, std::int32_t num_qo_heads, std::int32_t num_kv_heads, std::uintptr_t k,
             const std::string& k_dtype, std::int32_t k_dim, float k_scale, std::int64_t k_page_bytes, std::uintptr_t v,
             const std::string& v_dtype, std::int32_t v_dim, float v_scale, std::int64_t v_page_bytes) {
            new (self)
                LayerKV{num_qo_heads, num_kv_heads, cache_at(k, k_dtype, num_kv_heads, k_dim, k_scale, k_page_bytes),
                        cache_at(v, v_dtype, num_kv_heads, v_dim, v_scale, v_page_bytes)};
          },
          nb::kw_only(), "num_qo_heads"_a, "num_kv_heads"_a, "k"_a, "k_dtype"_a, "k_dim"_a, "k_scale"_a,
          "k_page_bytes"_a, "v"_a, "v_dtype"_a, "v_dim"_a, "v_scale"_a, "v_page_bytes"_a);

  nb::class_<Plan>(m, "AttentionPlan", "Attention over a page table: plan once a step, append and run once a layer.")
      .def(nb::init<const std::vector<LayerKV>&, const std::string&, std::int32_t, std::int32_t, int,
                    const std::string&>(),
           "layers"_a, "dtype"_a, "num_pages"_a, "page_size"_a, "num_threads"_a, "isa"_a = "")
      .def("plan", &Plan::plan, "table"_a)
      .def("append", &Plan::append)
      .def("run", &Plan::run)
      .def_prop_ro("cascade", &Plan::cascade)
      .def("set_costs", &Plan::set_costs, "costs"_a)
      .def_prop_ro("num_rows", &Plan::num_rows)
      .def_prop_ro("isa", &Plan::isa)
      .def_prop_rw("num_threads", &Plan::num_threads, &Plan::set_num_threads);
}

}  // namespace radixkv
