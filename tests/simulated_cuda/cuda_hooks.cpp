// What torch asks of CUDA before it differentiates a tensor that says it is there. Nothing happens when it is asked.
// The library has to be loaded before torch: its isAccelerator then takes the place of torch's, and autograd runs on
// the calling thread, without streams and events of the accelerator that a CPU build of torch does not have.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at::accelerator {
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; }
}  // namespace at::accelerator

namespace {

const c10::Device GPU{c10::DeviceType::CUDA, 0};
const c10::Stream STREAM{c10::Stream::DEFAULT, GPU};

struct SimulatedHooks : at::CUDAHooksInterface {
  explicit SimulatedHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  void init() const override {}
};

struct SimulatedGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return GPU; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(SimulatedHooks)
C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard)

}  // namespace
