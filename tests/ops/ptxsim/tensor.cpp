// mma.sync and ldmatrix. Fragments: PTX ISA 9.7.14.5.
//
// Register m of a fragment, taken over the 32 lanes as 64 numbers of 16 bits, is an 8 x 8 matrix
// row by row: lane l holds numbers 2 (l % 4) and the next of row l / 4. For A the rows are A's (the
// quarters of a 16 x 16 tile column by column), for B its columns.
#include "block.h"
#include "values.h"

namespace ptxsim {

constexpr size_t kNumbers = 64;  // of a register
using Numbers = double[kNumbers];
typedef double Four __attribute__((vector_size(32)));

static void expand(const Words& from, bool bf16, Numbers& to) {
  uint16_t halves[kNumbers];
  float singles[kNumbers];
  std::memcpy(halves, from.data(), sizeof halves);
  if (bf16) {
    uint32_t words[kNumbers];
    for (size_t n = 0; n < kNumbers; ++n) words[n] = uint32_t{halves[n]} << 16;
    std::memcpy(singles, words, sizeof singles);
  } else {
    for (size_t n = 0; n < kNumbers; ++n) singles[n] = from_f16(halves[n]);
  }
  for (size_t n = 0; n < kNumbers; ++n) to[n] = static_cast<double>(singles[n]);
}

static double toward_zero(double x) {  // to a float
  const float near = static_cast<float>(x);
  if (std::abs(static_cast<double>(near)) <= std::abs(x)) return near;
  return std::nextafter(near, 0.0f);
}

// Two rows of eight sums: c + a b, with two rows of A and all of B (k by n). Two, so that the
// processor has sums that do not wait for each other.
static void multiply_rows(const Numbers* a, size_t row, size_t steps, const Four (*b)[2],
                          bool truncate, Four (&sums)[4]) {
  Four first_low = sums[0], first_high = sums[1], second_low = sums[2], second_high = sums[3];
  for (size_t step = 0; step < steps; ++step) {
    const double *first = a[step] + row * 8, *second = first + 8;
    for (size_t k = 0; k < 8; ++k) {
      const Four low = b[step * 8 + k][0], high = b[step * 8 + k][1];
      first_low += first[k] * low, first_high += first[k] * high;
      second_low += second[k] * low, second_high += second[k] * high;
    }
    if (!truncate) continue;
    for (Four* each : {&first_low, &first_high, &second_low, &second_high}) {
      for (size_t n = 0; n < 4; ++n) (*each)[n] = toward_zero((*each)[n]);
    }
  }
  sums[0] = first_low, sums[1] = first_high, sums[2] = second_low, sums[3] = second_high;
}

// D = A B + C with sums in double, where the products are exact.
void Block::multiply_add(Warp& w, const Instruction& i) {
  const size_t steps = i.depth / 8;  // 8 x 8 matrices along k
  Four b[16][2];
  Words result[4];  // written at the end: registers may be those of A
  for (size_t step = 0; step < steps; ++step) {
    Numbers columns;
    expand(w.regs32[i.in[2 * steps + step].index], i.bf16, columns);
    for (size_t k = 0; k < 8; ++k) {
      for (size_t n = 0; n < 8; ++n) b[step * 8 + k][n / 4][n % 4] = columns[n * 8 + k];
    }
  }
  for (size_t half = 0; half < 2; ++half) {
    Numbers a[2];
    for (size_t step = 0; step < steps; ++step) {
      expand(w.regs32[i.in[step * 2 + half].index], i.bf16, a[step]);
    }
    Words scratch[2];
    const uint32_t* even = view32(w, i.in[3 * steps + half * 2], scratch[0]);
    const uint32_t* odd = view32(w, i.in[3 * steps + half * 2 + 1], scratch[1]);
    for (size_t row = 0; row < 8; row += 2) {
      Four sums[4];  // lane 4 row + n holds columns 2 n and 2 n + 1
      for (size_t n = 0; n < 8; ++n) {
        sums[n / 2][n % 2 * 2] = bits<float>(even[row * 4 + n]);
        sums[n / 2][n % 2 * 2 + 1] = bits<float>(odd[row * 4 + n]);
      }
      multiply_rows(a, row, steps, b, options_.truncate, sums);
      for (size_t n = 0; n < 8; ++n) {
        result[half * 2][row * 4 + n] = f32(static_cast<float>(sums[n / 2][n % 2 * 2]));
        result[half * 2 + 1][row * 4 + n] = f32(static_cast<float>(sums[n / 2][n % 2 * 2 + 1]));
      }
    }
  }
  for (size_t n = 0; n < 4; ++n) {
    if (i.to[n].kind == Operand::kReg32) w.regs32[i.to[n].index] = result[n];
  }
}

// Thread t points at row t % 8 of matrix t / 8. With .trans the lane's numbers come from column
// l / 4. A read counts for the lane that gets the number.
void Block::load_matrices(Warp& w, const Instruction& i, int pc) {
  static const auto kReaders = [] {  // lanes by transposed, row, column
    std::array<std::array<std::array<uint32_t, kRow>, kRow>, 2> lanes{};
    for (uint32_t row = 0; row < kRow; ++row) {
      for (uint32_t column = 0; column < kRow; ++column) {
        lanes[0][row][column] = 1u << (row * 4 + column / 2);
        lanes[1][row][column] = 1u << (column * 4 + row / 2);
      }
    }
    return lanes;
  }();
  Lanes address;
  fetch_address(w, i.in[0], address);
  Count& count = result_.counts[static_cast<size_t>(pc)];
  uint64_t ideal;
  const uint32_t readers = i.vector == 4 ? kAllLanes : (1u << i.vector * 8) - 1;
  count.wavefronts += wavefronts(address, readers, 16, ideal);
  count.ideal += ideal;
  const uint32_t access = access_of(w, pc);
  uint16_t matrices[4][8][8];
  for (uint32_t m = 0; m < i.vector; ++m) {
    for (uint32_t row = 0; row < 8; ++row) {
      const auto at = static_cast<uint32_t>(address[m * 8 + row] & (kSharedWindow - 1));
      const int lane = static_cast<int>(m * 8 + row);
      std::memset(matrices[m][row], 0xA5, 16);
      if (!in_shared(w, lane, at, 16, pc, false)) continue;
      std::memcpy(matrices[m][row], shared_.data() + (at - kSharedBase), 16);
      if (options_.check) {
        read_row(w, (at - kSharedBase) / 2, kReaders[i.transposed][row].data(), access);
      }
    }
  }
  for (size_t m = 0; m < i.vector; ++m) {
    Words value;
    if (!i.transposed) {
      std::memcpy(value.data(), matrices[m], sizeof value);
    } else {
      for (size_t l = 0; l < kWarp; ++l) {
        const size_t column = l / 4, row = l % 4 * 2;
        value[l] = uint32_t{matrices[m][row][column]} |
                   uint32_t{matrices[m][row + 1][column]} << 16;
      }
    }
    if (i.to[m].kind == Operand::kReg32) w.regs32[i.to[m].index] = value;
  }
}

}  // namespace ptxsim
