// One instruction of PTX. The numbers in brackets are sections of the PTX ISA document, 9.0.
#include <algorithm>
#include <cctype>

#include "ptx.h"

namespace ptxsim {
namespace {

const std::map<std::string, Type> kTypes = {
    {"pred", PRED}, {"u8", U8}, {"s8", S8}, {"b8", B8}, {"u16", U16}, {"s16", S16}, {"b16", B16},
    {"u32", U32}, {"s32", S32}, {"b32", B32}, {"u64", U64}, {"s64", S64}, {"b64", B64},
    {"f16", F16}, {"bf16", BF16}, {"f16x2", F16X2}, {"bf16x2", BF16X2}, {"f32", F32}, {"f64", F64}};
const std::map<std::string, Compare> kCompares = {
    {"eq", EQ}, {"ne", NE}, {"lt", LT}, {"le", LE}, {"gt", GT}, {"ge", GE}, {"lo", LT},
    {"ls", LE}, {"hi", GT}, {"hs", GE}, {"equ", EQU}, {"neu", NEU}, {"ltu", LTU}, {"leu", LEU},
    {"gtu", GTU}, {"geu", GEU}, {"num", NUM}, {"nan", NAN_}};
const std::map<std::string, Op> kSimple = {  // one result, then the sources
    {"add", ADD}, {"sub", SUB}, {"fma", FMA}, {"div", DIV}, {"rem", REM}, {"and", AND}, {"or", OR},
    {"xor", XOR}, {"not", NOT}, {"neg", NEG}, {"abs", ABS}, {"shl", SHL}, {"shr", SHR},
    {"min", MIN}, {"max", MAX}, {"selp", SELP}, {"bfi", BFI}, {"bfe", BFE}, {"prmt", PRMT},
    {"popc", POPC}, {"clz", CLZ}, {"rcp", RCP}, {"sqrt", SQRT}, {"rsqrt", RSQRT}, {"ex2", EX2},
    {"lg2", LG2}, {"tanh", TANH}, {"copysign", COPYSIGN},
    {"lop3", LOP3}, {"activemask", ACTIVEMASK}};
const char* const kIgnored[] = {"membar", "fence", "setmaxnreg", "nanosleep", "prefetch",
                                "griddepcontrol"};
const std::map<std::string, Reduce> kReductions = {
    {"add", RED_ADD}, {"min", RED_MIN}, {"max", RED_MAX}, {"and", RED_AND}, {"or", RED_OR},
    {"xor", RED_XOR}, {"exch", RED_EXCH}, {"cas", RED_CAS}};

class InstructionParser {
 public:
  InstructionParser(const std::string& line, const Names& names) : names_(names) {
    i_.text = line;
    size_t begin = 0;
    if (line[0] == '@') {
      const size_t end = line.find_first_of(" \t");
      i_.guard = names.find(line.substr(1, end - 1));
      begin = line.find_first_not_of(" \t", end);
    }
    const size_t end = std::min(line.find_first_of(" \t", begin), line.size());
    opcode_ = line.substr(begin, end - begin);
    parts_ = split(opcode_, '.', false);
    args_ = split(line.substr(end), ',', true);
    for (const std::string& part : parts_) {
      const auto type = kTypes.find(part);
      if (type != kTypes.end()) types_.push_back(type->second);
    }
    if (!types_.empty()) i_.type = types_[0];
    i_.ftz = has("ftz"), i_.saturate = has("sat"), i_.relaxed = has("relaxed");
  }

  Instruction parse(std::string& label) {
    const std::string& base = parts_[0];
    if (base == "mov") move();
    else if (base == "mul" || base == "mad") multiply();
    else if (base == "setp") compare();
    else if (base == "cvt") convert();
    else if (base == "cvta") plain(has("shared") ? has("to") ? CVTA_TO_SHARED : CVTA_SHARED : MOV);
    else if (base == "shf") shift();
    else if (base == "ld" || base == "ldu" || base == "st") load_store();
    else if (base == "atom" || base == "red") atomic();
    else if (base == "bra") i_.op = BRA, label = args_.at(0);
    else if (base == "ret" || base == "exit") i_.op = RET;
    else if (base == "trap") i_.op = TRAP;
    else if (base == "bar" || base == "barrier") barrier();
    else if (base == "shfl" || base == "vote" || base == "elect" || base == "redux") collective();
    else if (base == "mma") mma();
    else if (base == "ldmatrix") ldmatrix();
    else if (base == "cp") copy();
    else if (base == "mbarrier") mbarrier();
    else simple(base);
    return i_;
  }

 private:
  const Names& names_;
  Instruction i_;
  std::string opcode_;
  std::vector<std::string> parts_, args_;
  std::vector<Type> types_;

  [[noreturn]] void fail() const { throw PtxError("unknown instruction " + opcode_); }
  bool has(const char* name) const {
    return std::find(parts_.begin(), parts_.end(), name) != parts_.end();
  }
  bool in_shared() const { return has("shared") || has("shared::cta") || has("shared::cluster"); }
  Operand operand(size_t n) const { return names_.find(args_.at(n)); }
  Operand immediate(uint64_t value) const { return names_.find(std::to_string(value)); }

  // [base + offset]; the offset of a register goes into `value`.
  Operand address(size_t n) const {
    const std::string& text = args_.at(n);
    if (text.size() < 2 || text[0] != '[') fail();
    const std::string inner = text.substr(1, text.size() - 2);
    const size_t plus = inner.find('+');
    Operand o = names_.find(inner.substr(0, plus));
    if (plus != std::string::npos) {
      o.value += static_cast<uint64_t>(std::stoll(inner.substr(plus + 1), nullptr, 0));
    }
    return o;
  }
  std::vector<Operand> list(size_t n) const {
    const std::string& text = args_.at(n);
    if (text[0] != '{') return {names_.find(text)};
    std::vector<Operand> all;
    for (const std::string& part : split(text.substr(1, text.size() - 2), ',', false)) {
      all.push_back(names_.find(part));
    }
    return all;
  }
  void sources(size_t first) {
    for (size_t n = first; n < args_.size(); ++n) i_.in.push_back(operand(n));
  }
  void plain(Op op) {
    i_.op = op;
    i_.to = {operand(0)};
    sources(1);
  }

  void move() {
    if (args_.at(0)[0] == '{') i_.op = UNPACK, i_.to = list(0), i_.in = {operand(1)};
    else if (args_.at(1)[0] == '{') i_.op = PACK, i_.to = {operand(0)}, i_.in = list(1);
    else plain(MOV);
  }
  void multiply() {
    const bool mad = parts_[0] == "mad";
    const bool number = i_.type >= F16;
    if (number) plain(mad ? FMA : MUL_LO);
    else if (has("wide")) plain(mad ? MAD_WIDE : MUL_WIDE);
    else if (has("hi") && !mad) plain(MUL_HI);
    else if (has("lo")) plain(mad ? MAD_LO : MUL_LO);
    else fail();
  }
  void compare() {
    const auto found = kCompares.find(parts_.at(1));
    if (found == kCompares.end() || args_.at(0).find('|') != std::string::npos) fail();
    plain(SETP);
    i_.compare = found->second;
    i_.boolean = has("and") ? 1 : has("or") ? 2 : has("xor") ? 3 : 0;
  }
  void convert() {
    if (types_.size() != 2 || has("rz") || has("relu")) fail();
    plain(CVT);
    i_.from = types_[1];
    i_.mode = has("rzi") ? ROUND_ZERO : has("rni") ? ROUND_NEAREST : has("rmi") ? ROUND_DOWN
              : has("rpi") ? ROUND_UP : ROUND_NONE;
  }
  void shift() {
    if (!has("wrap")) fail();
    plain(SHF);
    i_.mode = has("r");
  }
  void load_store() {
    const bool load = parts_[0] != "st";
    i_.op = load ? LD : ST;
    i_.space = has("param") ? PARAM : in_shared() ? SHARED : has("global") ? GLOBAL : GENERIC;
    if (has("local") || has("const") || has("v8")) fail();
    i_.vector = has("v2") ? 2 : has("v4") ? 4 : 1;
    i_.in = {address(load ? 1 : 0)};
    if (load) {
      i_.to = list(0);
    } else {
      for (const Operand& o : list(1)) i_.in.push_back(o);
    }
  }
  void atomic() {
    i_.op = ATOM;
    i_.space = in_shared() ? SHARED : has("global") ? GLOBAL : GENERIC;
    const bool result = parts_[0] == "atom";
    if (has("v2") || has("v4") || has("noftz") != (i_.type >= F16 && i_.type <= BF16X2)) fail();
    size_t named = parts_.size();
    for (size_t n = 1; n < parts_.size(); ++n) if (kReductions.count(parts_[n])) named = n;
    if (named == parts_.size()) fail();
    i_.mode = kReductions.at(parts_[named]);
    i_.to = {result ? operand(0) : Operand()};
    i_.in = {address(result ? 1 : 0)};
    sources(result ? 2 : 1);
  }

  // bar.sync id[, threads]; bar.arrive id, threads; bar.warp.sync mask (9.7.13.1, 2)
  void barrier() {
    if (has("warp")) {
      i_.op = BAR_WARP;
      sources(0);
      return;
    }
    if (!has("sync") && !has("arrive")) fail();
    i_.op = has("sync") ? BAR_SYNC : BAR_ARRIVE;
    sources(0);
    if (i_.op == BAR_ARRIVE && i_.in.size() != 2) fail();
  }
  void collective() {
    const std::string& base = parts_[0];
    i_.op = base == "shfl" ? SHFL : base == "vote" ? VOTE : base == "elect" ? ELECT : REDUX;
    for (const std::string& name : split(args_.at(0), '|', false)) {
      i_.to.push_back(names_.find(name));
    }
    sources(1);
    if (i_.op == SHFL) {
      i_.mode = has("bfly") ? SHFL_BFLY : has("idx") ? SHFL_IDX : has("up") ? SHFL_UP : SHFL_DOWN;
    } else if (i_.op == VOTE) {
      i_.mode = has("ballot") ? VOTE_BALLOT : has("any") ? VOTE_ANY : has("uni") ? VOTE_UNI
                : VOTE_ALL;
    } else if (i_.op == REDUX) {
      const auto found = kReductions.find(parts_.at(2));
      if (found == kReductions.end() || i_.type >= F16) fail();
      i_.mode = found->second;
    }
  }
  void mma() {
    i_.op = MMA;
    i_.depth = has("m16n8k16") ? 16 : 8, i_.bf16 = has("bf16");
    const std::string number = i_.bf16 ? "bf16." : "f16.";
    if (opcode_ != "mma.sync.aligned.m16n8k" + std::to_string(i_.depth) + ".row.col.f32." + number +
                       number + "f32") {
      fail();
    }
    i_.to = list(0);
    for (size_t n = 1; n < args_.size(); ++n) {
      for (const Operand& o : list(n)) i_.in.push_back(o);
    }
    if (i_.to.size() != 4 || i_.in.size() != (i_.depth == 16 ? 10 : 7)) fail();
  }
  void ldmatrix() {
    i_.op = LDMATRIX;
    i_.vector = has("x4") ? 4 : has("x2") ? 2 : 1;
    i_.transposed = has("trans");
    i_.to = list(0);
    if (!has("m8n8") || !has("b16") || !in_shared() || i_.to.size() != i_.vector) fail();
    i_.in = {address(1)};
  }

  // cp.async and its groups (9.7.9.25.3); bulk copies (9.7.9.25.4)
  void copy() {
    if (has("commit_group") && !has("bulk")) {
      i_.op = CP_COMMIT;
    } else if ((has("wait_group") || has("wait_all")) && !has("bulk")) {
      i_.op = CP_WAIT;
      i_.wait_all = has("wait_all");
      i_.in = {i_.wait_all ? immediate(0) : operand(0)};
    } else if (has("mbarrier") && has("arrive")) {
      i_.op = CP_ARRIVE;
      i_.no_increment = has("noinc");
      i_.in = {address(0)};
    } else if (has("bulk")) {
      const bool known = in_shared() && has("global") && has("mbarrier::complete_tx::bytes");
      if (!known || has("tensor") || has("multicast::cluster")) fail();
      if (parts_.at(3).find("shared") != 0) fail();  // to shared memory, from global
      i_.op = CP_BULK;
      i_.in = {address(0), address(1), operand(2), address(3)};
    } else if (in_shared() && has("global")) {
      i_.op = CP_ASYNC;
      if (has("L2::cache_hint")) fail();
      i_.in = {address(0), address(1), operand(2), operand(args_.size() > 3 ? 3 : 2)};
      const uint64_t size = i_.in[2].value;
      if (size != 16 && (has("cg") || (size != 4 && size != 8))) fail();
    } else {
      fail();
    }
  }

  // 9.7.13.15
  void mbarrier() {
    const std::string& what = parts_.at(1);
    i_.space = in_shared() ? SHARED : GENERIC;
    if (what == "init") {
      i_.op = MBAR_INIT, i_.in = {address(0), operand(1)};
    } else if (what == "inval") {
      i_.op = MBAR_INVAL, i_.in = {address(0)};
    } else if (what == "expect_tx") {
      i_.op = MBAR_EXPECT, i_.in = {address(0), operand(1)};
    } else if (what == "arrive" || what == "arrive_drop") {
      arrive(what == "arrive_drop");
    } else if (what == "test_wait" || what == "try_wait") {
      i_.op = MBAR_WAIT;
      i_.parity = has("parity");
      i_.to = {operand(0)};
      i_.in = {address(1), operand(2)};  // a hint of how long to wait is ignored
    } else {
      fail();
    }
    if (has("noComplete")) fail();
  }
  void arrive(bool drop) {
    i_.op = MBAR_ARRIVE;
    i_.drop = drop, i_.expects = has("expect_tx");
    const size_t first = args_.at(0)[0] == '[' ? 0 : 1;
    i_.to = {first ? operand(0) : Operand()};
    i_.in = {address(first), args_.size() > first + 1 ? operand(first + 1) : immediate(1)};
  }

  void simple(const std::string& base) {
    for (const char* ignored : kIgnored) if (base == ignored) return (void)(i_.op = NOP);
    const auto found = kSimple.find(base);
    if (found == kSimple.end() || has("cc") || has("NaN")) fail();
    plain(found->second);
  }
};

}  // namespace

// Parts without blanks; inside braces and brackets the text is not split.
std::vector<std::string> split(const std::string& text, char by, bool nested) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    if (nested && (c == '{' || c == '[')) ++depth;
    if (nested && (c == '}' || c == ']')) --depth;
    if (c == by && depth == 0) {
      parts.push_back(part);
      part.clear();
    } else if (!std::isspace(static_cast<unsigned char>(c))) {
      part += c;
    }
  }
  if (!part.empty()) parts.push_back(part);
  return parts;
}

Instruction parse_instruction(const std::string& line, const Names& names, std::string& label) {
  return InstructionParser(line, names).parse(label);
}

}  // namespace ptxsim
