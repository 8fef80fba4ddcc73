// The text of a PTX module: directives, declarations, scopes. Instructions: instructions.cpp.
#include <cctype>
#include <cstdio>
#include <map>
#include <sstream>

#include "ptx.h"

namespace ptxsim {
namespace {

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", TID_X}, {"%tid.y", TID_Y}, {"%tid.z", TID_Z}, {"%ntid.x", NTID_X},
    {"%ntid.y", NTID_Y}, {"%ntid.z", NTID_Z}, {"%ctaid.x", CTAID_X}, {"%ctaid.y", CTAID_Y},
    {"%ctaid.z", CTAID_Z}, {"%nctaid.x", NCTAID_X}, {"%nctaid.y", NCTAID_Y},
    {"%nctaid.z", NCTAID_Z}, {"%laneid", LANEID}, {"%lanemask_eq", LANEMASK_EQ},
    {"%lanemask_lt", LANEMASK_LT}, {"%lanemask_le", LANEMASK_LE}, {"%lanemask_gt", LANEMASK_GT},
    {"%lanemask_ge", LANEMASK_GE}};

uint32_t round_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }

Operand immediate(uint64_t value) {
  Operand o;
  o.kind = Operand::kImmediate, o.value = value;
  return o;
}

// What a pair of braces declares: inline assembly has registers and labels of its own.
struct Scope {
  std::map<std::string, Operand> registers;
  std::map<std::string, uint32_t> labels;
  int parent;
};

struct Branch {
  size_t instruction;
  std::string label;
  int scope;
};

class Parser : public Names {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  std::vector<Kernel> run() {
    std::vector<Kernel> kernels;
    module_variables();
    for (;;) {
      const size_t next = text_.find(".entry", at_);
      if (next == std::string::npos) break;
      at_ = next + 6;
      kernels.push_back(kernel());
    }
    std::map<int, std::string> files;
    std::istringstream lines(text_);
    for (std::string line; std::getline(lines, line);) {
      int number;
      char name[1024];
      if (std::sscanf(line.c_str(), " .file %d \"%1023[^\"]\"", &number, name) == 2) {
        files[number] = name;
      }
    }
    for (Kernel& k : kernels) k.files = files;
    return kernels;
  }

  // A register, a number, the address of a parameter or of shared memory, or "_".
  Operand find(const std::string& given) const override {
    std::string name = given;
    bool negated = false;
    if (name[0] == '!') negated = true, name = name.substr(1);
    if (name == "_") return {};
    Operand o;
    if (register_named(name, o)) {
      o.negated = negated;
      return o;
    }
    if (name.compare(0, 2, "0f") == 0 || name.compare(0, 2, "0F") == 0 ||
        name.compare(0, 2, "0d") == 0 || name.compare(0, 2, "0D") == 0) {
      return immediate(std::stoull(name.substr(2), nullptr, 16));
    }
    if (name[0] == '-') return immediate(static_cast<uint64_t>(std::stoll(name, nullptr, 0)));
    if (std::isdigit(static_cast<unsigned char>(name[0]))) {
      if (name.back() == 'U') name.pop_back();
      return immediate(std::stoull(name, nullptr, 0));
    }
    for (const Param& p : kernel_.params) {
      if (p.name == name) return immediate(p.offset);
    }
    const auto variable = shared_.find(name);
    if (variable != shared_.end()) return immediate(variable->second);
    if (name == dynamic_) {
      Operand start = immediate(kSharedBase);
      start.index = kDynamic;
      return start;
    }
    throw fail("unknown symbol " + name);
  }

 private:
  // Dynamic shared memory starts where static ends, which is known at the end of the kernel only.
  // Until then this is the index of an immediate operand.
  static constexpr uint32_t kDynamic = 1;

  const std::string& text_;
  size_t at_ = 0;
  std::map<std::string, uint64_t> shared_;  // static variables
  std::string dynamic_;
  uint32_t static_bytes_ = 0, module_static_bytes_ = 0;
  Kernel kernel_;
  std::map<std::string, std::pair<bool, uint32_t>> arrays_;  // %r<9>: 64 bits wide, first register
  std::vector<Scope> scopes_;
  int scope_ = 0;
  std::vector<Branch> branches_;
  std::map<std::vector<int>, int> last_loc_;  // (file, line, column): the latest Loc there
  int loc_ = -1;

  PtxError fail(const std::string& what) const { return PtxError(kernel_.name + ": " + what); }

  void skip_blanks() {
    for (;;) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (text_.compare(at_, 2, "//") != 0) return;
      at_ = std::min(text_.find('\n', at_), text_.size());
    }
  }
  std::string until(const char* ends) {
    const size_t end = std::min(text_.find_first_of(ends, at_), text_.size());
    std::string part = text_.substr(at_, end - at_);
    at_ = end + 1;
    return part;
  }

  bool register_named(const std::string& name, Operand& o) const {
    const auto special = kSpecials.find(name);
    if (special != kSpecials.end()) {
      o.kind = Operand::kSpecial, o.index = special->second;
      return true;
    }
    for (int s = scope_; s >= 0; s = scopes_[static_cast<size_t>(s)].parent) {
      const auto& registers = scopes_[static_cast<size_t>(s)].registers;
      const auto found = registers.find(name);
      if (found != registers.end()) {
        o = found->second;
        return true;
      }
    }
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
    const auto found = arrays_.find(name.substr(0, digits));
    if (found == arrays_.end() || digits == name.size()) return false;
    o.kind = found->second.first ? Operand::kReg64 : Operand::kReg32;
    o.index = found->second.second + static_cast<uint32_t>(std::stoul(name.substr(digits)));
    return true;
  }

  void shared_variable(const std::string& line) {  // .shared .align 8 .b8 name[64]
    int align;
    char name[1024];
    unsigned bytes = 0;
    const size_t at = line.find(".shared");
    const int got = std::sscanf(line.c_str() + at, ".shared .align %d .b8 %1023[^[ ;][%u]", &align,
                                name, &bytes);
    if (line.find(".extern") != std::string::npos && got >= 2) {
      dynamic_ = name;
      return;
    }
    unsigned bits = 0;
    if (got == 3) {
      static_bytes_ = round_up(static_bytes_, static_cast<uint32_t>(align));
    } else if (std::sscanf(line.c_str() + at, ".shared .align %d .%*[bufs]%u %1023[^; []", &align,
                           &bits, name) == 3) {
      bytes = bits / 8, static_bytes_ = round_up(static_bytes_, static_cast<uint32_t>(align));
    } else {
      throw fail("unknown declaration " + line);
    }
    shared_[name] = kSharedBase + static_bytes_;
    static_bytes_ += bytes;
  }

  void module_variables() {
    std::istringstream lines(text_);
    for (std::string line; std::getline(lines, line);) {
      const size_t first = line.find_first_not_of(" \t");
      if (first != 0) continue;  // inside a kernel: declared by body()
      if (line.compare(0, 7, ".shared") == 0 || line.find(".extern .shared") == 0 ||
          line.find(".visible .shared") == 0) {
        shared_variable(line);
      }
    }
    module_static_bytes_ = static_bytes_;
  }

  void location(const std::string& line) {
    // .loc file line column[, function_name s, inlined_at f l c]
    int f, l, c, pf, pl, pc, parent = -1;
    if (std::sscanf(line.c_str(), ".loc %d %d %d", &f, &l, &c) != 3) return;
    const size_t inlined = line.find("inlined_at");
    if (inlined != std::string::npos &&
        std::sscanf(line.c_str() + inlined, "inlined_at %d %d %d", &pf, &pl, &pc) == 3) {
      const auto found = last_loc_.find({pf, pl, pc});
      if (found != last_loc_.end()) {
        parent = found->second;
      } else {
        kernel_.locs.push_back({pf, pl, pc, -1});
        parent = static_cast<int>(kernel_.locs.size()) - 1;
      }
    }
    kernel_.locs.push_back({f, l, c, parent});
    loc_ = static_cast<int>(kernel_.locs.size()) - 1;
    last_loc_[{f, l, c}] = loc_;
  }

  void parameters() {
    std::istringstream all(until(")"));
    for (std::string part; std::getline(all, part, ',');) {
      std::istringstream words(part);
      Param p{"", 0, 0};
      uint32_t align = 1, element = 0;
      for (std::string word; words >> word;) {
        if (word == ".align") {
          words >> align;
        } else if (word == ".ptr" || word == ".global" || word == ".shared") {
          if (word == ".ptr") pointer_attributes(words);
        } else if (word[0] == '.' && word != ".param") {
          element = static_cast<uint32_t>(std::stoul(word.substr(2))) / 8;
          align = std::max(align, element);
        } else if (word[0] != '.') {
          p.name = word;
        }
      }
      if (p.name.empty()) continue;
      p.size = element;
      const size_t bracket = p.name.find('[');
      if (bracket != std::string::npos) {
        p.size = element * static_cast<uint32_t>(std::stoul(p.name.substr(bracket + 1)));
        p.name = p.name.substr(0, bracket);
      }
      p.offset = round_up(kernel_.param_bytes, align);
      kernel_.param_bytes = p.offset + p.size;
      kernel_.params.push_back(p);
    }
  }
  // ".ptr .global .align 16 name": the alignment is the pointee's.
  static void pointer_attributes(std::istringstream& words) {
    for (;;) {
      const auto back = words.tellg();
      std::string word;
      if (!(words >> word)) return;
      if (word == ".align") words >> word;
      else if (word[0] != '.') return (void)words.seekg(back);
    }
  }

  void declare_registers(std::string line) {  // .reg .b32 %r<9>  or  .reg .pred p, q
    for (char& c : line) if (c == '\t' || c == '\n') c = ' ';
    const size_t dot = line.find('.', 4), blank = line.find(' ', dot);
    if (dot == std::string::npos || blank == std::string::npos) throw fail("unknown " + line);
    const std::string type = line.substr(dot + 1, blank - dot - 1);
    const bool wide = type.find("64") != std::string::npos;
    if (type == "b128") throw fail("unknown type in " + line);
    uint32_t& total = wide ? kernel_.regs64 : kernel_.regs32;
    for (const std::string& name : split(line.substr(blank), ',', false)) {
      const size_t angle = name.find('<');
      if (angle != std::string::npos) {
        arrays_[name.substr(0, angle)] = {wide, total};
        total += static_cast<uint32_t>(std::stoul(name.substr(angle + 1)));
      } else {
        Operand o;
        o.kind = wide ? Operand::kReg64 : Operand::kReg32, o.index = total++;
        scopes_[static_cast<size_t>(scope_)].registers[name] = o;
      }
    }
  }

  void statement() {
    if (text_.compare(at_, 4, ".loc") == 0) return location(until("\n"));
    if (text_.compare(at_, 7, ".pragma") == 0) return (void)until(";");
    if (text_.compare(at_, 4, ".reg") == 0) return declare_registers(until(";"));
    if (text_.compare(at_, 7, ".shared") == 0) return shared_variable(until(";"));
    if (text_[at_] == '.') throw fail("unknown directive " + until("\n"));
    const size_t end = text_.find_first_of(" \t\n;:{", at_);
    if (text_[end] == ':' && text_[end + 1] != ':') {
      scopes_[static_cast<size_t>(scope_)].labels[text_.substr(at_, end - at_)] =
          static_cast<uint32_t>(kernel_.code.size());
      at_ = end + 1;
      return;
    }
    std::string line = until(";"), label;
    for (char& c : line) if (c == '\n' || c == '\t') c = ' ';
    Instruction i;
    try {
      i = parse_instruction(line, *this, label);
    } catch (const std::logic_error&) {  // std::stoi and friends
      throw fail("unknown operand in " + line);
    } catch (const PtxError& error) {
      throw fail(std::string(error.what()) + " in " + line);
    }
    i.loc = loc_;
    if (!label.empty()) branches_.push_back({kernel_.code.size(), label, scope_});
    kernel_.code.push_back(std::move(i));
  }

  void body() {
    scopes_.assign(1, Scope{{}, {}, -1});
    scope_ = 0;
    for (;;) {
      skip_blanks();
      if (at_ >= text_.size()) throw fail("the text ends inside a kernel");
      const char c = text_[at_];
      if (c == ';') {
        ++at_;
      } else if (c == '{') {
        scopes_.push_back(Scope{{}, {}, scope_});
        scope_ = static_cast<int>(scopes_.size()) - 1;
        ++at_;
      } else if (c == '}') {
        ++at_;
        if (scope_ == 0) return;
        scope_ = scopes_[static_cast<size_t>(scope_)].parent;
      } else {
        statement();
      }
    }
  }

  void resolve() {
    for (const Branch& b : branches_) {
      int s = b.scope;
      while (s >= 0 && !scopes_[static_cast<size_t>(s)].labels.count(b.label)) {
        s = scopes_[static_cast<size_t>(s)].parent;
      }
      if (s < 0) throw fail("no label " + b.label);
      kernel_.code[b.instruction].target = scopes_[static_cast<size_t>(s)].labels[b.label];
    }
    kernel_.static_shared = static_bytes_;
    for (Instruction& i : kernel_.code) {
      for (Operand& o : i.in) {
        if (o.kind == Operand::kImmediate && o.index == kDynamic) {
          o.value += round_up(static_bytes_, 16);
        }
      }
    }
    Instruction end;
    end.op = RET, end.text = "(end)", end.loc = loc_;
    kernel_.code.push_back(end);
  }

  Kernel kernel() {
    kernel_ = Kernel();
    static_bytes_ = module_static_bytes_;
    arrays_.clear(), branches_.clear(), last_loc_.clear();
    loc_ = -1;
    skip_blanks();
    const size_t paren = text_.find_first_of("({ \t\n", at_);
    kernel_.name = text_.substr(at_, paren - at_);
    at_ = text_.find_first_of("({", paren);
    if (text_[at_] == '(') ++at_, parameters();
    const size_t open = text_.find('{', at_), limit = text_.find(".maxntid", at_);
    if (limit < open) {
      kernel_.max_threads = static_cast<uint32_t>(std::stoul(text_.substr(limit + 8)));
    }
    at_ = open + 1;
    body();
    resolve();
    return kernel_;
  }
};

}  // namespace

std::vector<Kernel> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptxsim
