// The driver API, and the simulator's own functions.
#include <cstring>
#include <memory>
#include <sstream>
#include <string>

#include "driver.h"
#include "machine.h"

namespace ptxsim {

struct Function {
  Kernel kernel;
  Result result;
  int allowed_shared = 0;  // by cuFuncSetAttribute; 0 if it was not called
};

struct Module {
  std::vector<Function*> functions;
};

}  // namespace ptxsim

namespace {

using namespace ptxsim;

struct Limits {
  int shared = 48 << 10, shared_opt_in = 227 << 10, threads = 1024;
};

struct State {
  std::vector<std::unique_ptr<Function>> functions;  // of all modules; kept for their findings
  std::vector<std::unique_ptr<Module>> modules;
  std::map<std::pair<std::string, std::string>, uint64_t> refused;  // kernel, why: launches
  Options options;
  Limits limits;
  bool strict = true;
  std::string message, text;  // of the last error; of the last report
};

State& state() {
  static State* s = new State;  // never destroyed: kernels may run at exit
  return *s;
}

int refuse(const Function& f, const std::string& why, Error error) {
  ++state().refused[{f.kernel.name, why}];
  state().message = f.kernel.name + ": " + why;
  return error;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + "\"";
}

std::string instruction(const Kernel& kernel, int pc) {
  return pc < 0 ? "" : kernel.code[static_cast<size_t>(pc)].text;
}

// What is wrong with a launch before it starts; empty if nothing.
std::string launch_error(const Function& f, Dim grid, Dim block, unsigned shared, Error& error) {
  const Limits& limits = state().limits;
  const unsigned threads = block.x * block.y * block.z;
  error = kInvalidValue;
  const auto text = [](unsigned n) { return std::to_string(n); };
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    return "grid of " + text(grid.x) + ", " + text(grid.y) + ", " + text(grid.z) + " blocks";
  }
  if (block.y != 1 || block.z != 1) return "the simulator knows blocks of one dimension alone";
  if (threads == 0 || threads > static_cast<unsigned>(limits.threads)) {
    return "block of " + text(threads) + " threads; the limit is " +
           std::to_string(limits.threads);
  }
  if (f.kernel.param_bytes > 4096) return "more than 4096 bytes of parameters";
  const unsigned total = shared + f.kernel.static_shared;
  const int dynamic = f.allowed_shared ? f.allowed_shared : limits.shared;
  if (shared > static_cast<unsigned>(dynamic) ||
      (!f.allowed_shared && total > static_cast<unsigned>(limits.shared))) {
    return text(total) + " bytes of shared memory a block; " + std::to_string(dynamic) +
           " are allowed without cuFuncSetAttribute";
  }
  if (total > static_cast<unsigned>(limits.shared_opt_in)) {
    return text(total) + " bytes of shared memory a block; the architecture has " +
           std::to_string(limits.shared_opt_in);
  }
  error = kOutOfResources;
  if (f.kernel.max_threads && threads > f.kernel.max_threads) {
    return "block of " + text(threads) + " threads; __launch_bounds__ says " +
           text(f.kernel.max_threads);
  }
  return "";
}

std::string describe(const Kernel& kernel, const Key& key, const Finding& finding) {
  std::string text = key.kind + " at " + place(kernel, key.pc);
  if (key.other >= 0) text += " and " + place(kernel, key.other);
  return text + " (" + finding.example + ")";
}

int launch(Function& f, Dim grid, Dim block, unsigned shared, void** params, void** extra) {
  State& s = state();
  Error error = kSuccess;
  const std::string why = launch_error(f, grid, block, shared, error);
  if (!why.empty()) return refuse(f, why, error);
  if (extra || (!params && !f.kernel.params.empty())) {
    return refuse(f, "parameters are taken from kernelParams alone", kInvalidValue);
  }
  std::vector<uint8_t> bytes(f.kernel.param_bytes, kPoison);
  for (size_t n = 0; n < f.kernel.params.size(); ++n) {
    std::memcpy(bytes.data() + f.kernel.params[n].offset, params[n], f.kernel.params[n].size);
  }
  const std::map<Key, Finding> before = f.result.findings;
  f.result.trapped = false;
  run_grid(f.kernel, grid, block.x, shared, bytes, s.options, f.result);
  s.message = f.kernel.name + ":";
  bool found = false;
  for (const auto& [key, finding] : f.result.findings) {
    const auto old = before.find(key);
    if (old != before.end() && old->second.count == finding.count) continue;
    s.message += "\n  " + describe(f.kernel, key, finding);
    found = true;
  }
  if (f.result.trapped) return kLaunchFailed;
  return found && s.strict ? kIllegalAddress : kSuccess;
}

}  // namespace

extern "C" {

int cuModuleLoadData(Module** module, const void* image) {
  State& s = state();
  try {
    auto loaded = std::make_unique<Module>();
    for (Kernel& kernel : parse(static_cast<const char*>(image))) {
      s.functions.push_back(std::make_unique<Function>());
      s.functions.back()->kernel = std::move(kernel);
      loaded->functions.push_back(s.functions.back().get());
    }
    *module = loaded.get();
    s.modules.push_back(std::move(loaded));
    return kSuccess;
  } catch (const std::exception& error) {
    s.message = std::string("ptxsim: ") + error.what();
    return kInvalidPtx;
  }
}

int cuModuleUnload(Module*) { return kSuccess; }

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  for (Function* f : module->functions) {
    if (f->kernel.name != name) continue;
    *function = f;
    return kSuccess;
  }
  state().message = std::string("no kernel ") + name;
  return kNotFound;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
  constexpr int kMaxDynamicSharedBytes = 8, kPreferredCarveout = 9;
  if (attribute == kPreferredCarveout) return kSuccess;
  if (attribute != kMaxDynamicSharedBytes) {
    return refuse(*function, "unknown attribute " + std::to_string(attribute), kInvalidValue);
  }
  const int most = state().limits.shared_opt_in - static_cast<int>(function->kernel.static_shared);
  if (value < 0 || value > most) {
    return refuse(*function, "opt-in to " + std::to_string(value) +
                  " bytes of dynamic shared memory; the architecture has " + std::to_string(most),
                  kInvalidValue);
  }
  function->allowed_shared = value;
  return kSuccess;
}

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void*, void** params, void** extra) {
  return launch(*function, {gx, gy, gz}, {bx, by, bz}, shared, params, extra);
}

int cuGetErrorString(int error, const char** text) {
  State& s = state();
  if (error == kSuccess) s.message = "no error";
  else if (s.message.empty()) s.message = "error " + std::to_string(error);
  *text = s.message.c_str();
  return kSuccess;
}

// ---- the simulator's own ----

void ptxsim_set_options(int order, unsigned long seed, int truncate, int check, int strict) {
  state().options = {static_cast<Order>(order), seed, truncate != 0, check != 0};
  state().strict = strict != 0;
}

void ptxsim_set_limits(int shared, int shared_opt_in, int threads) {
  state().limits = {shared, shared_opt_in, threads};
}

void ptxsim_add_allocation(const void* base, unsigned long bytes) { add_allocation(base, bytes); }
void ptxsim_remove_allocation(const void* base) { remove_allocation(base); }

void ptxsim_clear() {
  for (auto& f : state().functions) f->result = Result();
  state().refused.clear();
  state().message.clear();
}

// A list of objects: kernel, kind, count, at, other (places in the source), instruction, example.
const char* ptxsim_findings() {
  State& s = state();
  std::ostringstream out;
  const char* comma = "[";
  for (const auto& [launch, count] : s.refused) {
    out << comma << "{\"kernel\": " << quoted(launch.first) << ", \"kind\": \"launch refused\""
        << ", \"count\": " << count << ", \"at\": \"\", \"other\": \"\", \"instruction\": \"\""
        << ", \"example\": " << quoted(launch.second) << "}";
    comma = ",\n";
  }
  for (const auto& f : s.functions) {
    for (const auto& [key, finding] : f->result.findings) {
      out << comma << "{\"kernel\": " << quoted(f->kernel.name) << ", \"kind\": "
          << quoted(key.kind) << ", \"count\": " << finding.count << ", \"at\": "
          << quoted(place(f->kernel, key.pc)) << ", \"other\": "
          << quoted(place(f->kernel, key.other)) << ", \"instruction\": "
          << quoted(instruction(f->kernel, key.pc)) << ", \"example\": "
          << quoted(finding.example) << "}";
      comma = ",\n";
    }
  }
  s.text = (*comma == '[' ? "[" : "") + out.str() + "]";
  return s.text.c_str();
}

// A list of rows: kernel, place, opcode, then the numbers of `Count`.
const char* ptxsim_counts() {
  State& s = state();
  std::ostringstream out;
  const char* comma = "[";
  for (const auto& f : s.functions) {
    for (size_t pc = 0; pc < f->result.counts.size(); ++pc) {
      const Count& c = f->result.counts[pc];
      if (c.warps == 0) continue;
      std::string text = f->kernel.code[pc].text;
      if (text[0] == '@') text = text.substr(text.find(' ') + 1);
      text = text.substr(text.find_first_not_of(" \t"));
      out << comma << "[" << quoted(f->kernel.name) << ", "
          << quoted(place(f->kernel, static_cast<int>(pc))) << ", "
          << quoted(text.substr(0, text.find_first_of(" \t"))) << ", " << c.warps << ", "
          << c.lanes << ", " << c.wavefronts << ", " << c.ideal << ", " << c.sectors << ", "
          << c.bytes << "]";
      comma = ",\n";
    }
  }
  s.text = (*comma == '[' ? "[" : "") + out.str() + "]";
  return s.text.c_str();
}

}  // extern "C"
