// Shapes of products that share one body of code (shapes.cuh), as a table.
#pragma once
#include "program.cuh"

enum Rows : u32 { kStraight = 0, kDiagonal = 1, kInTurn = 2, kSideBySide = 3 };

// Of a product; a row of weights has `parts` parts of k elements along k, each of another matrix.
// What divides comes as a power of two, or as its inverse: no code for divisions.
struct Shape {
  u32 k, parts, tile_rows, matrices;
  u32 segment_shift;  // segments of a row: a power of two
  u32 rows;           // which rows of weights it takes: Rows
  u32 bank_rows;      // of a chosen matrix; diagonal: rows with the same x
  u32 weight_step;    // bytes of a unit from one step of a lane to the next
  u32 bank_inverse, part_inverse, k_inverse,
      block_inverse;          // of bank_rows, matrices and parts, k, blocks of k
  u32 count;                  // chosen matrices of a token
  u32 x_stride;               // diagonal: from one block's x to the next
  u32 row_shift;              // rows that have one scale for each block of columns: a power of two
  u32 column_shift;           // those columns in blocks of 64 bytes: a power of two
  u32 columns;                // of scales in a part
  u32 groups, group_inverse;  // of rows that have the same scales, in a matrix of a bank
  u32 fitting;                // groups whose scales are kept at a time
  u32 x_pitch, y_pitch;       // from one token to the next
  u32 epilogue;               // Epilogue
  u32 beyond;                 // see Beyond
  float eps, inverse;         // of the norm; 1 / elements of a row
  bool normed, weighted, tagged_x, tagged_y, narrow_y;

  __device__ __forceinline__ u32 elements() const { return k * parts; }  // of a row of x
  __device__ __forceinline__ u32 tile_shift() const { return 5 - segment_shift - matrices; }
  __device__ __forceinline__ u32 unit_rows() const { return tile_rows * matrices; }
};
// n / d, by the inverse of d: ceil(2^31 / d); exact where n * d is below 2^31.
__device__ __forceinline__ u32 quotient(u32 n, u32 inverse) { return u64(n) * inverse >> 31; }
#include "shapes.h"  // kShapes
