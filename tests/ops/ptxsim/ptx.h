// PTX as NVRTC prints it: kernels, their instructions, and where in the source these come from.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptxsim {

constexpr uint32_t kSharedBase = 0x400;  // address of a block's first byte of shared memory

enum Type : uint8_t { NONE, PRED, U8, S8, B8, U16, S16, B16, U32, S32, B32, U64, S64, B64,
                      F16, BF16, F16X2, BF16X2, F32, F64 };

enum Op : uint8_t {
  MOV, PACK, UNPACK, ADD, SUB, MUL_LO, MUL_HI, MUL_WIDE, MAD_LO, MAD_WIDE, FMA, DIV, REM, AND, OR,
  XOR, NOT, NEG, ABS, SHL, SHR, MIN, MAX, SELP, SETP, CVT, CVTA_TO_SHARED, CVTA_SHARED, BFI, BFE,
  PRMT, POPC, CLZ, LOP3, SHF, RCP, SQRT, RSQRT, EX2, LG2, TANH, COPYSIGN, LD, ST, ATOM, BRA, RET,
  TRAP, NOP, ACTIVEMASK, CP_ASYNC, CP_COMMIT, CP_WAIT, CP_ARRIVE, CP_BULK, MBAR_INIT, MBAR_INVAL,
  MBAR_ARRIVE, MBAR_EXPECT, MBAR_WAIT,
  // Instructions that a warp executes as a whole:
  BAR_WARP, BAR_SYNC, BAR_ARRIVE, SHFL, VOTE, ELECT, REDUX, MMA, LDMATRIX, NUM_OPS
};
constexpr bool is_collective(Op op) { return op >= BAR_WARP; }

enum Space : uint8_t { GENERIC, PARAM, SHARED, GLOBAL };
enum Compare : uint8_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
enum Special : uint8_t { TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z,
                         NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID, LANEMASK_EQ, LANEMASK_LT,
                         LANEMASK_LE, LANEMASK_GT, LANEMASK_GE };

// What `Instruction::mode` says, by instruction.
enum ShflMode : uint8_t { SHFL_BFLY, SHFL_IDX, SHFL_UP, SHFL_DOWN };
enum VoteMode : uint8_t { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };
enum Round : uint8_t { ROUND_NONE, ROUND_ZERO, ROUND_NEAREST, ROUND_DOWN, ROUND_UP };  // cvt
enum Reduce : uint8_t { RED_ADD, RED_MIN, RED_MAX, RED_AND, RED_OR, RED_XOR, RED_EXCH, RED_CAS };

struct Operand {
  // kSink is "_": the value is not wanted.
  enum Kind : uint8_t { kSink, kReg32, kReg64, kImmediate, kSpecial } kind = kSink;
  bool negated = false;  // of a predicate
  uint32_t index = 0;    // of the register, or the special
  uint64_t value = 0;    // of an immediate; the offset of an address
};

struct Instruction {
  Op op = NOP;
  Type type = NONE, from = NONE;  // cvt: to, from
  Space space = GENERIC;
  Compare compare = EQ;
  uint8_t mode = 0;
  uint8_t vector = 1;     // ld, st: elements; ldmatrix: matrices
  uint8_t boolean = 0;    // setp: 1 and, 2 or, 3 xor
  uint8_t depth = 16;     // mma: k
  bool ftz = false, saturate = false;
  bool bf16 = false;      // mma
  bool transposed = false;             // ldmatrix
  bool wait_all = false;               // cp.async.wait_all
  bool relaxed = false;                // mbarrier: neither release nor acquire
  bool parity = false;                 // mbarrier waits: by parity, not by state
  bool drop = false, no_increment = false, expects = false;  // mbarrier arrivals
  Operand guard;          // predicate, or none
  std::vector<Operand> to, in;
  uint32_t target = 0;    // of a branch
  int loc = -1;           // into Kernel::locs
  std::string text;
};

struct Loc {
  int file, line, column, parent;  // parent: the call it is inlined at, or -1
};

struct Param {
  std::string name;
  uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  uint32_t param_bytes = 0, max_threads = 0;
  uint32_t static_shared = 0;      // bytes; dynamic shared memory follows
  uint32_t regs32 = 0, regs64 = 0;
  std::vector<Instruction> code;
  std::vector<Loc> locs;
  std::map<int, std::string> files;
};

// What the simulator does not know, or PTX that is wrong.
struct PtxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<Kernel> parse(const std::string& text);

// One instruction, its operands resolved by `names`; branches keep their label in `label`.
struct Names {
  virtual ~Names() = default;
  virtual Operand find(const std::string& name) const = 0;  // throws PtxError
};
Instruction parse_instruction(const std::string& line, const Names& names, std::string& label);

std::vector<std::string> split(const std::string& text, char by, bool nested);

}  // namespace ptxsim
