// What calls over pairs and the helpers around them ask of Python's objects.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fused_losses {

namespace py = pybind11;

// A tensor on the CPU that is of no subclass but nn.Parameter.
bool is_plain(const py::handle& object);
// Whether all of them are, and no mode looks at single operations in this thread.
bool all_plain(const py::args& objects);

// Whether PairInputs are such tensors that fit each other; where they do not, and for powers of
// distances, Python says why or goes on.
bool pairs_fit(const py::tuple& inputs);
// Of PairInputs that fit: value, total, count and best of the rows, and with `cols` of the columns
// (else None), of which value and total have a gradient of any order.
py::tuple pair_statistics(const py::tuple& inputs, const std::string& reduction, bool cols,
                          int64_t kept_scores);

}  // namespace fused_losses
