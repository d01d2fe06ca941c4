// Tasks of a mixture of experts; see ops/experts.py.
#pragma once
#include <memory>

#include "operands.h"
#include "task.h"

namespace tilert {

// Each throws as make_task does.
std::unique_ptr<Task> make_route(const Operands& in, const RouteFields& f, const Kernels& kernels);
std::unique_ptr<Task> make_expert_gate(const Operands& in, const ExpertGateFields& f,
                                       const Kernels& kernels);
std::unique_ptr<Task> make_expert_down(const Operands& in, const ExpertDownFields& f,
                                       const Kernels& kernels);

}  // namespace tilert
