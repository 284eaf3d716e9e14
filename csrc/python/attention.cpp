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

using attention::AttentionParams;
using attention::AttentionPlan;
using attention::DType;
using attention::KvLayout;
using attention::Rows;
using attention::Scales;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  invalid("dtype is " + name + ": it must be float32, bfloat16 or float16");
}

DType kv_dtype_named(const std::string& name) { return name == "float8_e4m3fn" ? DType::f8 : dtype_named(name); }

// An AttentionPlan and what its layout has beside strides.
class Plan {
 public:
  Plan(std::int32_t num_qo_heads, std::int32_t num_kv_heads, std::int32_t head_dim, std::int32_t num_pages,
       std::int32_t page_size, const std::string& dtype, const std::string& kv_dtype, int num_threads,
       const std::string& isa)
      : layout_{dtype_named(dtype), kv_dtype_named(kv_dtype), num_pages, page_size, num_kv_heads, head_dim, 0, 0, 0},
        plan_(num_qo_heads, layout_, num_threads, isa.c_str()) {}

  void plan(const PyTable& t) {
    const StepTable& table = t.table();
    const nb::gil_scoped_release release;
    plan_.plan(table);
  }

  void append(std::uintptr_t k, std::int64_t k_row, std::int64_t k_head, std::uintptr_t v, std::int64_t v_row,
              std::int64_t v_head, std::uintptr_t k_cache, std::uintptr_t v_cache, std::int64_t page_stride,
              std::int64_t slot_stride, std::int64_t head_stride, float k_scale, float v_scale) {
    const nb::gil_scoped_release release;
    plan_.append(strided(page_stride, slot_stride, head_stride), reinterpret_cast<void*>(k_cache),
                 reinterpret_cast<void*>(v_cache), Rows{reinterpret_cast<const void*>(k), k_row, k_head},
                 Rows{reinterpret_cast<const void*>(v), v_row, v_head}, Scales{k_scale, v_scale});
  }

  void run(std::uintptr_t q, std::int64_t q_row, std::int64_t q_head, std::uintptr_t k_cache, std::uintptr_t v_cache,
           std::int64_t page_stride, std::int64_t slot_stride, std::int64_t head_stride, std::uintptr_t out,
           float sm_scale, std::int32_t window_left, float logits_soft_cap, float v_scale) {
    const nb::gil_scoped_release release;
    plan_.run(strided(page_stride, slot_stride, head_stride), reinterpret_cast<const void*>(k_cache),
              reinterpret_cast<const void*>(v_cache), Rows{reinterpret_cast<const void*>(q), q_row, q_head},
              reinterpret_cast<void*>(out), AttentionParams{sm_scale, window_left, logits_soft_cap, v_scale});
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
  KvLayout strided(std::int64_t page_stride, std::int64_t slot_stride, std::int64_t head_stride) const {
    KvLayout layout = layout_;
    layout.page_stride = page_stride;
    layout.slot_stride = slot_stride;
    layout.head_stride = head_stride;
    return layout;
  }

  KvLayout layout_;
  AttentionPlan plan_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "isa", [] { return std::string(attention::kernel().isa); },
      "The instruction set that attention uses: the machine's best, or the environment's RADIXKV_ISA.");
  m.attr("CHUNK_KEYS") = attention::kChunkKeys;
  m.def("isas", &attention::supported_isas, "The instruction sets that this machine supports, best first.");

  nb::class_<Plan>(m, "AttentionPlan", "Attention over a page table: plan once a step, append and run once a layer.")
      .def(nb::init<std::int32_t, std::int32_t, std::int32_t, std::int32_t, std::int32_t, const std::string&,
                    const std::string&, int, const std::string&>(),
           "num_qo_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_pages"_a, "page_size"_a, "dtype"_a, "kv_dtype"_a,
           "num_threads"_a, "isa"_a = "")
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
