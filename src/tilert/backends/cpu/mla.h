// Tasks of latent attention; see ops/mla.py.
#pragma once
#include <memory>

#include "operands.h"
#include "task.h"

namespace tilert {

// Each throws as make_task does.
std::unique_ptr<Task> make_latent_rope(const Operands& in, const LatentRopeFields& f,
                                       const Kernels& kernels);
std::unique_ptr<Task> make_latent_attention(const Operands& in, const LatentAttentionFields& f,
                                            const Kernels& kernels);

}  // namespace tilert
