// Tasks of the indexer of sparse attention; see ops/index.py.
#pragma once
#include <memory>

#include "operands.h"
#include "task.h"

namespace tilert {

// Each throws as make_task does.
std::unique_ptr<Task> make_index_rope(const Operands& in, const IndexRopeFields& f,
                                      const Kernels& kernels);
std::unique_ptr<Task> make_index_score(const Operands& in, const IndexScoreFields& f,
                                       const Kernels& kernels);
std::unique_ptr<Task> make_select(const Operands& in, const SelectFields& f);

}  // namespace tilert
