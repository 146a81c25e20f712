// What calls over pairs and the helpers around them ask of Python's objects.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fused_losses {

namespace py = pybind11;

// A tensor on the CPU that is of no subclass but nn.Parameter.
bool is_plain(const py::handle& object);
// Whether nothing looks at single operations in this thread: a mode, a transform of torch.func, a
// level of forward mode.
bool is_eager();
// Whether that is so, and all of them are plain.
bool all_plain(const py::args& objects);
// Whether they are besides matrices of floating point rows of one dtype and width.
bool rows_meet(const py::handle& x, const py::handle& y);

// Whether PairInputs are plain and fit each other; where they do not, and for powers of distances,
// Python says why or goes on.
bool pairs_fit(const py::tuple& inputs);
// Of PairInputs that fit: value, total, count and best of the rows, and with `cols` of the columns
// (else None), of which value and total have a gradient of any order. kept_scores < 0: all of them,
// if a gradient is asked for and they are no more than so many bytes.
py::tuple pair_statistics(const py::tuple& inputs, const std::string& reduction, bool cols,
                          int64_t kept_scores);
// `reduced_shares` (bind.h) of two pair_sums.Shares, the second or None; None where they are not
// plain, of one wide dtype and of at most so many elements each.
py::object shares_reduced(const py::tuple& rows, const py::object& columns, bool mean,
                          bool everyone, bool wide, int64_t most);

}  // namespace fused_losses
