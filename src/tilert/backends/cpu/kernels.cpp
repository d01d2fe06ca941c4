// One instruction set's table. Built once for each, with TILERT_ISA naming it.
#include "kernels.h"

#include "attention.h"
#include "latent.h"
#include "linear.h"
#include "norm.h"
#include "rope.h"
#include "sample.h"

#define TILERT_TEXT(x) #x
#define TILERT_NAME(x) TILERT_TEXT(x)

namespace tilert::TILERT_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    TILERT_NAME(TILERT_ISA),
    linear,
    linear_scratch,
    many_tokens,
    many_scratch,
    norm,
    rope,
    attention,
    attention_partial,
    attention_scratch,
    combine,
    latent_begin,
    latent_rows,
    latent_end,
    latent_scratch,
    latent_pack,
    latent_unpack,
    layer_norm,
    hadamard,
    index_scores,
    embed,
    argmax,
    read,
};

}  // namespace tilert::TILERT_ISA
