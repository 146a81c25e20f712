// Two CUDA devices that hold nothing: what PyTorch without CUDA asks of a device when tensors of
// torch's FakeTensorMode are on one, in autograd's threads too. Loaded ahead of libtorch.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// found by this name
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 2; }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace

extern "C" int fake_current_device() { return Guard::getDeviceIndex(); }

extern "C" int fake_exchange_device(int device) {
  const int before = Guard::getDeviceIndex();
  if (device >= 0) Guard::setDeviceIndex(static_cast<c10::DeviceIndex>(device));
  return before;
}
