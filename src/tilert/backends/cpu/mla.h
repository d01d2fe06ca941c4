// Tasks of latent attention; see ops/mla.py.
#pragma once
#include <memory>

#include "operands.h"
#include "task.h"

namespace tilert {

// Each throws as make_task does.
std::unique_ptr<Task> make_latent_append(const Operands& in, const LatentAppendFields& f,
                                         const Kernels& kernels);
std::unique_ptr<Task> make_latent_attention(const Operands& in, const LatentAttentionFields& f,
                                            const Kernels& kernels);

}  // namespace tilert
