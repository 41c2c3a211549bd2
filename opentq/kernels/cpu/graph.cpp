// A decode step (step.cpp around attend.cpp) as an operation of MLX's graph: MLX computes one layer while Python builds the next.
//
// An extension as MLX documents them, made with nanobind; the kernels themselves are those of the other libraries, called by
// address. What a call points to beside its inputs lives as long as the process (codebooks) or is copied here (lengths).
// Packed keys and values are inputs, so that MLX keeps them while it needs them.
#include <nanobind/nanobind.h>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

#include "step.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace otq {

using Append = void (*)(const StepCall*);
using Attend = int (*)(const Call*);
using Turn = void (*)(float*, int64_t, int64_t);

// Addresses, as Python knows them, of a call and the functions that do it.
struct Kernels {
  Append append;
  Attend attend;
  Turn turn;
};

// One step, all but where its arrays lie. Inputs: q, k, v, old_k, old_v, then center and sinks where there are such, then packed arrays.
struct Work {
  StepCall step;
  Call call;
  Kernels kernels;
  std::vector<int32_t> lens;
  bool centred, sinks;
};

static Tensor tensor(const mx::array& x, const std::vector<int64_t>& strides) {
  Tensor t{};
  t.data = const_cast<char*>(x.data<char>());
  t.strides = const_cast<int64_t*>(strides.data());
  return t;
}

class Step : public mx::Primitive {
 public:
  Step(mx::Stream stream, Work work) : Primitive(stream), work_(std::move(work)) {}
  const char* name() const override { return "OpenTQStep"; }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override { throw std::runtime_error("a step of the CPU"); }

  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (auto& x : out) x.set_data(mx::allocator::malloc(x.nbytes()));
    // MLX keeps the buffers until the task is over, not the arrays.
    std::vector<std::vector<int64_t>> strides;
    for (int i = 0; i < 5 + work_.centred; i++) strides.emplace_back(in[i].strides().begin(), in[i].strides().end());
    std::vector<Tensor> views;
    for (size_t i = 0; i < strides.size(); i++) views.push_back(tensor(in[i], strides[i]));
    Work work = work_;
    work.step.k_out = out[1].data<uint16_t>(), work.step.v_out = out[2].data<uint16_t>();
    work.call.out = out[0].data<float>();
    work.call.sinks = work.sinks ? in[5 + work.centred].data<float>() : nullptr;
    const size_t queries = in[0].size();
    mx::cpu::get_command_encoder(stream()).dispatch([work = std::move(work), strides = std::move(strides), views = std::move(views), queries]() mutable {
      for (size_t i = 0; i < views.size(); i++) views[i].strides = strides[i].data();
      const std::unique_ptr<float[]> q(new float[queries]);
      StepCall& step = work.step;
      step.q = &views[0], step.k = &views[1], step.v = &views[2], step.old_k = &views[3], step.old_v = &views[4];
      step.center = work.centred ? &views[5] : nullptr, step.q_out = q.get();
      Call& call = work.call;
      call.q.data = call.projected.data = call.plain.data = q.get();
      call.dense_k.data = step.k_out, call.dense_v.data = step.v_out, call.lens = work.lens.data();
      work.kernels.append(&step);
      if (work.kernels.attend(&call)) throw std::bad_alloc();
      if (step.turn_v) work.kernels.turn(static_cast<float*>(call.out), step.batch * step.q_heads * step.length, step.dim_v);
    });
  }

 private:
  const Work work_;
};

// The output, and the columns of keys and values. `step`, `call` and `lens` are addresses, of what may change afterwards.
static nb::tuple step(uintptr_t at_step, uintptr_t at_call, uintptr_t at_lens, uintptr_t append, uintptr_t attend, uintptr_t turn,
                      nb::list arrays, bool centred, bool sinks) {
  const StepCall& s = *reinterpret_cast<const StepCall*>(at_step);
  const Call& c = *reinterpret_cast<const Call*>(at_call);
  const auto* lens = reinterpret_cast<const int32_t*>(at_lens);
  const Kernels kernels{reinterpret_cast<Append>(append), reinterpret_cast<Attend>(attend), reinterpret_cast<Turn>(turn)};
  std::vector<mx::array> inputs;
  for (const auto x : arrays) inputs.push_back(nb::cast<mx::array>(x));
  const int batch = int(s.batch), heads = int(s.kv_heads), length = int(s.length), columns = int(s.columns) + length;
  const auto work = std::make_shared<Step>(mx::default_stream(mx::Device::cpu), Work{s, c, kernels, {lens, lens + 3 * batch}, centred, sinks});
  const auto out = mx::array::make_arrays(
      {{batch, int(s.q_heads), length, s.dim_v}, {batch, heads, columns, s.dim_k}, {batch, heads, columns, s.dim_v}},
      {mx::float32, mx::float16, mx::float16}, work, inputs);
  return nb::make_tuple(out[0], out[1], out[2]);
}

}  // namespace otq

NB_MODULE(opentq_graph, m) {
  nb::set_leak_warnings(false);
  m.def("step", &otq::step);
  m.def("same", [](const mx::array& x) { return x; });
}
