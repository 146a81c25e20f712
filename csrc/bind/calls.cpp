// Whether a call is one of plain eager code (base/compiled.py).
#include "calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace fused_losses {

bool is_plain(const py::handle& object) {
  return THPVariable_CheckExact(object.ptr()) && THPVariable_Unpack(object.ptr()).device().is_cpu();
}

bool all_plain(const py::args& objects) {
  if (c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
      at::impl::PythonTorchFunctionTLS::stack_len() > 0) {
    return false;
  }
  return std::all_of(objects.begin(), objects.end(), is_plain);
}

}  // namespace fused_losses
