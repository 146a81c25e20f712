// Whether a call is one of plain eager code (base/compiled.py).
#include "calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace fused_losses {

bool is_plain(const py::handle& object) {
  return THPVariable_CheckExact(object.ptr()) && THPVariable_Unpack(object.ptr()).device().is_cpu();
}

bool is_eager() {
  using c10::impl::tls_is_dispatch_key_included;
  return c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool all_plain(const py::args& objects) {
  return is_eager() && std::all_of(objects.begin(), objects.end(), is_plain);
}

bool rows_meet(const py::handle& x, const py::handle& y) {
  if (!is_eager() || !is_plain(x) || !is_plain(y)) return false;
  const at::Tensor &rows = THPVariable_Unpack(x.ptr()), &columns = THPVariable_Unpack(y.ptr());
  const at::ScalarType type = rows.scalar_type();
  const bool wide = type == at::kFloat || type == at::kDouble;
  return (wide || type == at::kHalf || type == at::kBFloat16) && columns.scalar_type() == type &&
         rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1);
}

}  // namespace fused_losses
