// radixkv._core's part for attention. Tensors cross as addresses and strides, checked in radixkv/attention/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
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
  if (name == "int8") return DType::i8;
  if (name == "int4") return DType::i4;
  invalid("dtype is " + name + ": it must be float32, bfloat16, float16, float8_e4m3fn, int8 or int4");
}

// Rows of `heads` heads, one after the other; scales: bytes from a page's first to its rows' scales.
Cache cache_at(std::uintptr_t address, const std::string& dtype, std::int32_t heads, std::int32_t dim, float scale,
               bool rotated, std::int64_t page_bytes, std::int64_t scales, std::uintptr_t centre, float usual_scale) {
  const DType stored = dtype_named(dtype);
  const std::int64_t row = attention::row_bytes(stored, dim);
  return Cache{reinterpret_cast<char*>(address),
               stored,
               dim,
               scale,
               rotated,
               page_bytes,
               heads * row,
               row,
               scales,
               heads * attention::kScaleBytes,
               reinterpret_cast<const float*>(centre),
               usual_scale};
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

  std::pair<attention::RowCounts, attention::RowCounts> counts(std::size_t layer) {
    const nb::gil_scoped_release release;
    const attention::LayerCounts counts = plan_.counts(layer);
    return {counts.k, counts.v};
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

void bind_layers(nb::module_& m) {
  nb::class_<attention::Cache>(m, "LayerCache",
                               "Where the pages of one layer's keys, or of its values, lie, and how rows do in them.")
      .def(
          "__init__",
          [](attention::Cache* self, std::uintptr_t address, const std::string& dtype, std::int32_t num_heads,
             std::int32_t dim, float scale, bool rotated, std::int64_t page_bytes, std::int64_t scales,
             std::uintptr_t centre, float usual_scale) {
            new (self) attention::Cache{
                cache_at(address, dtype, num_heads, dim, scale, rotated, page_bytes, scales, centre, usual_scale)};
          },
          nb::kw_only(), "address"_a, "dtype"_a, "num_heads"_a, "dim"_a, "scale"_a, "rotated"_a, "page_bytes"_a,
          "scales"_a, "centre"_a, "usual_scale"_a);

  nb::class_<attention::RowCounts>(m, "RowCounts", "What was stored of one layer's keys, or values, in 8 or 4 bits.")
      .def_ro("rows", &attention::RowCounts::rows)
      .def_ro("not_finite", &attention::RowCounts::not_finite)
      .def_ro("unusual", &attention::RowCounts::unusual)
      .def_ro("sampled", &attention::RowCounts::sampled)
      .def_ro("error_sum", &attention::RowCounts::error_sum)
      .def_ro("error_most", &attention::RowCounts::error_most);

  nb::class_<LayerKV>(m, "LayerKV", "Where one layer's K and V pages lie; see radixkv.pool.LayerKV.")
      .def(
          "__init__",
          [](LayerKV* self, std::int32_t num_qo_heads, std::int32_t num_kv_heads, const attention::Cache& k,
             const attention::Cache& v) { new (self) LayerKV{num_qo_heads, num_kv_heads, k, v}; },
          nb::kw_only(), "num_qo_heads"_a, "num_kv_heads"_a, "k"_a, "v"_a)
      .def_static("latent", &attention::latent_layer, nb::kw_only(), "num_qo_heads"_a, "k"_a, "v_dim"_a,
                  "A layer with one head of keys, whose first v_dim numbers are the values.");
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "isa", [] { return std::string(attention::kernel().isa); },
      "The instruction set that attention uses: the machine's best, or the environment's RADIXKV_ISA.");
  m.attr("CHUNK_KEYS") = attention::kChunkKeys;
  m.def("isas", &attention::supported_isas, "The instruction sets that this machine supports, best first.");

  bind_layers(m);

  nb::class_<Plan>(m, "AttentionPlan", "Attention over a page table: plan once a step, append and run once a layer.")
      .def(nb::init<const std::vector<LayerKV>&, const std::string&, std::int32_t, std::int32_t, int,
                    const std::string&>(),
           "layers"_a, "dtype"_a, "num_pages"_a, "page_size"_a, "num_threads"_a, "isa"_a = "")
      .def("plan", &Plan::plan, "table"_a)
      .def("append", &Plan::append)
      .def("run", &Plan::run)
      .def("counts", &Plan::counts, "layer"_a)
      .def_prop_ro("cascade", &Plan::cascade)
      .def("set_costs", &Plan::set_costs, "costs"_a)
      .def_prop_ro("num_rows", &Plan::num_rows)
      .def_prop_ro("isa", &Plan::isa)
      .def_prop_rw("num_threads", &Plan::num_threads, &Plan::set_num_threads);
}

}  // namespace radixkv
