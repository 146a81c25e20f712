// A streamed op and its gradient in plain eager code, without Python: what StreamedOp
// (primitives/op.py) does there, for an op whose first arguments are those that may need a
// gradient.
//
// Both call the registered ops. Second derivatives are then those that Python registered.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "helpers.h"

namespace fused_losses {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// What an op returns of its arguments. `below`: what autograd sees of it is registered elsewhere.
inline Stack called(const c10::OperatorHandle& op, Stack stack, bool below) {
  std::optional<at::AutoDispatchBelowAutograd> guard;
  if (below) guard.emplace();
  op.callBoxed(&stack);
  return stack;
}

inline c10::OperatorHandle registered(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fused_losses::" + name).c_str(), "");
}

// Op says
//   kName       of its registered op, which "_backward" follows
//   kMoving     how many of the op's arguments, the first ones, may need a gradient
//   kTold       how many, the last ones, the backward is not given
//   outputs     of what the op returned, the tensors that have a gradient
//   before      what the backward is given first: of their gradients (undefined: zeros), of these
//               outputs and of what the op returned. `further`: it is to be differentiated
// and may say
//   moves       which of the first arguments may need one, if not all
//   between     what the backward is given before argument i, or behind the last one
template <class Op>
struct Streamed : torch::autograd::Function<Streamed<Op>> {
  struct Call {
    const Stack& arguments;
    Stack& found;  // what the op returned
    variable_list& made;
    AutogradContext*& context;
  };

  // The op, with its gradient if one is asked for; what it returned is left in `found`.
  static variable_list run(const Stack& arguments, Stack& found) {
    variable_list moving;
    bool asked = false;
    for (size_t i = 0; i < Op::kMoving; ++i) {
      if (!moves(i) || !arguments[i].isTensor()) continue;
      moving.push_back(arguments[i].toTensor());
      asked = asked || moving.back().requires_grad();
    }
    if (asked && at::GradMode::is_enabled()) {
      variable_list made;
      AutogradContext* context = nullptr;
      try {
        return Streamed::apply(at::TensorList(moving), Call{arguments, found, made, context});
      } catch (...) {
        // a checkpoint ends its second run by an exception while tensors are saved: an output that
        // still waits for it would keep its own node alive
        if (!made.empty() && made[0].grad_fn()) context->save_for_backward({});
        throw;
      }
    }
    const at::NoGradGuard no_gradient;
    found = called(forward_op(), arguments, true);
    return Op::outputs(found);
  }

  static variable_list forward(AutogradContext* ctx, at::TensorList, const Call& call) {
    Stack& found = call.found;
    found = called(forward_op(), call.arguments, true);
    const variable_list outputs = call.made = Op::outputs(found);
    call.context = ctx;
    variable_list saved;
    saved.reserve(call.arguments.size() + found.size() + outputs.size());
    // a list, into which compiled autograd looks
    c10::impl::GenericList beside(c10::AnyType::get());
    for (size_t i = 0; i + Op::kTold < call.arguments.size(); ++i) {
      const c10::IValue& argument = call.arguments[i];
      const bool tensor = argument.isTensor() || argument.isNone();
      if (tensor) saved.push_back(argument.isTensor() ? argument.toTensor() : at::Tensor());
      beside.push_back(tensor ? c10::IValue() : argument);
    }
    ctx->saved_data[kBeside] = std::move(beside);
    for (const c10::IValue& value : found) saved.push_back(value.toTensor());
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    // read once: a checkpoint unpacks what was saved a single time
    const variable_list saved = ctx->get_saved_variables();
    const c10::IValue told = ctx->saved_data[kBeside];
    const c10::ArrayRef<c10::IValue> beside = told.toListRef();
    const size_t count = beside.size();
    const auto absent = [](const c10::IValue& value) { return value.isNone(); };
    const size_t tensors = std::count_if(beside.begin(), beside.end(), absent);
    const size_t returned = forward_op().schema().returns().size();
    const auto end = saved.begin() + tensors + returned;
    const variable_list found(saved.begin() + tensors, end), outputs(end, saved.end());
    const bool further = at::GradMode::is_enabled();
    const auto defined = [](const at::Tensor& t) { return t.defined(); };
    if (std::none_of(grads.begin(), grads.end(), defined)) {
      size_t moved = 0;
      for (size_t i = 0; i < Op::kMoving; ++i) moved += moves(i) && saved[i].defined();
      return variable_list(moved + 1);
    }

    Stack stack = Op::before(grads, outputs, found, further);
    std::vector<bool> needs(Op::kMoving);
    size_t moving = 0, at = 0;
    for (size_t i = 0; i < count; ++i) {
      between(stack, i, found);
      if (!absent(beside[i])) {
        stack.push_back(beside[i]);
        continue;
      }
      const at::Tensor& tensor = saved[at++];
      stack.push_back(tensor.defined() ? c10::IValue(tensor) : c10::IValue());
      if (moves(i) && tensor.defined()) needs[i] = ctx->needs_input_grad(moving++);
    }
    between(stack, count, found);
    for (size_t i = 0; i < Op::kMoving; ++i) {
      if (moves(i)) stack.emplace_back(static_cast<bool>(needs[i]));
    }
    stack = called(backward_op(), std::move(stack), !further);

    variable_list out;
    for (size_t i = 0, k = 0; i < Op::kMoving; ++i) {
      if (!moves(i)) continue;
      const at::Tensor slope = stack[k++].toTensor();
      if (saved[i].defined()) out.push_back(needs[i] ? slope : at::Tensor());
    }
    out.emplace_back();  // of what is beside the tensors
    return out;
  }

 private:
  // the arguments that are no tensors, each in its place
  static constexpr const char* kBeside = "beside";

  static constexpr bool moves(size_t i) {
    if constexpr (requires { Op::moves(i); }) return Op::moves(i);
    return i < Op::kMoving;
  }
  static void between(Stack& stack, size_t i, const variable_list& found) {
    if constexpr (requires { Op::between(stack, i, found); }) Op::between(stack, i, found);
  }
  static const c10::OperatorHandle& forward_op() {
    static const c10::OperatorHandle op = registered(Op::kName);
    return op;
  }
  static const c10::OperatorHandle& backward_op() {
    static const c10::OperatorHandle op = registered(std::string(Op::kName) + "_backward");
    return op;
  }
};

}  // namespace fused_losses
