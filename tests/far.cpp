// The device of far.py: the memory of its tensors is the CPU's, and every kernel of the CPU runs on it, but a tensor of one device is refused
// where those of the other are meant, as CUDA does. One boxed fallback for the dispatch key PrivateUse1.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;
using c10::TensorImpl;

const c10::Device FAR(c10::DeviceType::PrivateUse1, 0);

// A far storage holds the storage of the CPU whose memory it is, as the context of its pointer.

void forget(void* held) { delete static_cast<Storage*>(held); }

c10::DataPtr pointer(const Storage& here) { return {here.mutable_data(), new Storage(here), &forget, FAR}; }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return pointer(Storage(Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

const Storage& under(const Storage& far) {
  TORCH_CHECK(far.data_ptr().get_deleter() == &forget, "far: a storage that was made elsewhere");
  return *static_cast<Storage*>(far.data_ptr().get_context());
}

bool is_far(const at::Tensor& x) { return x.defined() && x.device().type() == c10::DeviceType::PrivateUse1; }

void place(TensorImpl* to, const at::Tensor& like) {
  to->set_sizes_and_strides(like.sizes(), like.strides());
  to->set_storage_offset(like.storage_offset());
}

// One call: its tensors are exchanged for tensors of the CPU over the same memory, and what comes out for far ones.

struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors; // (far, here)
  std::unordered_map<StorageImpl*, Storage> storages; // of the CPU to far

  at::Tensor here(const at::Tensor& far) {
    const auto& storage = under(far.storage());
    storages.emplace(storage.unsafeGetStorageImpl(), far.storage());
    auto out = at::detail::make_tensor<TensorImpl>(Storage(storage), DispatchKeySet(DispatchKey::CPU), far.dtype());
    place(out.unsafeGetTensorImpl(), far);
    if (far.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors.emplace_back(far, out);
    return out;
  }

  Storage far_of(const Storage& here) {
    auto [found, fresh] = storages.try_emplace(here.unsafeGetStorageImpl());
    if (fresh) found->second = Storage(Storage::use_byte_size_t(), here.nbytes(), pointer(here), &allocator, /*resizable=*/true);
    return found->second;
  }

  at::Tensor far(const at::Tensor& here) {
    if (!here.defined() || is_far(here)) return here;
    for (const auto& [far, own] : tensors)
      if (own.is_same(here)) return far; // changed in place
    TORCH_CHECK(here.layout() == c10::kStrided, "far: only dense tensors are pretended");
    auto out = at::detail::make_tensor<TensorImpl>(far_of(here.storage()), DispatchKeySet(DispatchKey::PrivateUse1), here.dtype());
    place(out.unsafeGetTensorImpl(), here);
    if (here.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
    return out;
  }

  // Sizes, strides and memory of a tensor change too: resize_, set_, transpose_, out=.
  void follow() {
    for (const auto& [far, here] : tensors) {
      auto* own = far.unsafeGetTensorImpl();
      auto storage = far_of(here.storage());
      if (!storage.is_alias_of(far.storage())) own->set_storage_keep_dtype(storage);
      if (storage.data() != here.storage().data()) storage.set_data_ptr_noswap(pointer(here.storage()));
      if (storage.nbytes() != here.storage().nbytes()) storage.set_nbytes(here.storage().nbytes());
      if (far.sizes() != here.sizes() || far.strides() != here.strides() || far.storage_offset() != here.storage_offset()) place(own, here);
    }
  }
};

// What CUDA has no kernel for.

bool matches(std::string_view name, std::initializer_list<std::string_view> words) {
  for (auto word : words)
    if (name == word) return true;
  return false;
}

void refuse_what_cuda_lacks(const c10::OperatorHandle& op, const std::vector<at::Tensor>& tensors) {
  const std::string_view full = op.operator_name().name;
  const auto name = full.substr(full.find(':') + 2);
  const bool of_the_cpu = full.substr(0, 6) != "aten::" || name.find("cpu") != name.npos || name.find("mkldnn") != name.npos ||
                          name.find("fbgemm") != name.npos || name.find("_dyn_quant") != name.npos;
  TORCH_CHECK_NOT_IMPLEMENTED(!of_the_cpu, "Could not run '", full, "' on a tensor of the far device: it has a kernel for the CPU alone");
  if (matches(name, {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_", "dot", "vdot"}))
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensors.empty() || !c10::isIntegralType(tensors[0].scalar_type(), true), "far: \"", name, "\" not implemented for integers, as on CUDA");
  if (name == "_int_mm")
    TORCH_CHECK(
        tensors[0].size(0) > 16 && tensors[0].size(1) % 8 == 0 && tensors[1].size(1) % 8 == 0,
        "far: _int_mm wants more than 16 rows, and multiples of 8, as on CUDA");
}

// Where CUDA takes a number that lies on the CPU.

bool takes_numbers_of_the_cpu(const c10::OperatorHandle& op) {
  std::string_view name = op.operator_name().name;
  name.remove_prefix(std::min(name.size(), std::string_view("aten::").size()));
  if (name.ends_with('_')) name.remove_suffix(1);
  return op.hasTag(at::Tag::pointwise) ||
         matches(name, {"where", "fill", "masked_fill", "index_fill", "index_put", "_index_put_impl", "floor_divide", "rsub",
                        "eq", "ne", "lt", "le", "gt", "ge", "copysign", "heaviside", "gcd", "lcm"});
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call;
  std::vector<at::Tensor> given;
  const bool numbers = takes_numbers_of_the_cpu(op);
  bool to_the_cpu = false;
  auto come = [&](const at::Tensor& x) {
    if (!x.defined()) return x;
    given.push_back(x);
    if (is_far(x)) return call.here(x);
    TORCH_CHECK(
        x.is_cpu() && x.dim() == 0 && (numbers || x.unsafeGetTensorImpl()->is_wrapped_number()), "Expected all tensors to be on the same device, but found at least two devices, far:0 and ", x.device(),
        "! (when calling ", op.operator_name().name, ")");
    return x;
  };
  const auto& schema = op.schema();
  const auto arguments = schema.arguments().size();
  for (auto at = stack->end() - arguments; at != stack->end(); ++at) {
    IValue& x = *at;
    if (x.isTensor()) {
      x = come(x.toTensor());
    } else if (x.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& each : x.toTensorVector()) out.push_back(come(each));
      x = out;
    } else if (x.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> out;
      for (const std::optional<at::Tensor>& each : x.toOptionalTensorVector())
        out.push_back(each ? std::optional<at::Tensor>(come(*each)) : each);
      x = out;
    } else if (x.isDevice()) {
      to_the_cpu = x.toDevice().is_cpu();
      x = c10::Device(c10::kCPU);
    } else if (x.isGenerator()) {
      TORCH_CHECK(!x.toGenerator().defined(), "Expected a 'far' device type for generator but found 'cpu'");
    } else if (x.isStorage()) {
      const auto storage = x.toStorage();
      TORCH_CHECK(storage.device_type() == FAR.type(), "far: a storage of the CPU");
      call.storages.emplace(under(storage).unsafeGetStorageImpl(), storage);
      x = under(storage);
    }
  }
  refuse_what_cuda_lacks(op, given);
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.follow();
  if (to_the_cpu) return;
  for (auto at = stack->end() - schema.returns().size(); at != stack->end(); ++at) {
    IValue& x = *at;
    if (x.isTensor()) {
      x = call.far(x.toTensor());
    } else if (x.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& each : x.toTensorVector()) out.push_back(call.far(each));
      x = out;
    }
  }
}

at::Tensor copy(const at::Tensor& from, const at::Tensor& to, bool) {
  Call call;
  auto here = [&](const at::Tensor& x) { return is_far(x) ? call.here(x) : x; };
  here(to).copy_(here(from));
  return to;
}

at::Tensor zeros(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::zeros(C10_AS_INTARRAYREF_SLOW(size), at::TensorOptions().dtype(dtype).device(FAR)); // with memory: plain kernels read it
}

at::Tensor histc(const at::Tensor& x, int64_t bins, const at::Scalar& low, const at::Scalar& high) { // of integers too, as on CUDA
  Call call;
  const auto here = call.here(x);
  return call.far(at::histc(c10::isIntegralType(x.scalar_type(), false) ? here.to(at::kDouble) : here, bins, low, high).to(x.scalar_type()));
}

// Numbers of one device and one stream, for whoever asks.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return FAR.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return FAR; }
  c10::Device getDevice() const override { return FAR; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, FAR); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, FAR); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, FAR); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

#define NARROW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { // what it does on CUDA
  AT_FORALL_LOWER_PRECISION_FP(NARROW)
  AT_FORALL_FP32(WIDE)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_copy_from", copy);
  m.impl("_efficientzerotensor", zeros);
  m.impl("histc", histc);
}
