// The Python module: thin, no logic of its own. Memory stays with Python, which passes addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "executor.h"
#include "kernels.h"
#include "pool.h"
#include "program.h"
#include "read_rate.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilert {
namespace {

using Address = std::pair<uintptr_t, size_t>;  // of the first byte, and how many

std::vector<Bytes> memory_of(const std::vector<Address>& addresses) {
  std::vector<Bytes> memory;
  for (auto [data, size] : addresses) memory.push_back({reinterpret_cast<char*>(data), size});
  return memory;
}

Memory parts_of(const std::vector<std::vector<Address>>& buffers) {
  Memory memory;
  for (const auto& parts : buffers) memory.push_back(memory_of(parts));
  return memory;
}

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa);
  if (!kernels) throw std::runtime_error("this machine has no kernels named " + isa);
  return *kernels;
}

// An executor and the Python arrays that it reads and writes. The executor goes first.
struct BoundExecutor {
  nb::object arrays;
  Executor executor;

  BoundExecutor(std::shared_ptr<Pool> pool, const std::string& isa, const nb::bytes& program,
                const std::vector<std::vector<Address>>& addresses, nb::object owners)
      : arrays(std::move(owners)),
        executor(std::move(pool), kernels_of(isa), Program::parse(program.c_str(), program.size()),
                 parts_of(addresses)) {}
};

nb::bytes history(const BoundExecutor& self, int64_t begin, int64_t end) {
  const std::vector<int32_t>& all = self.executor.history();
  const int64_t outputs = self.executor.outputs();
  if (begin < 0 || begin > end || end * outputs > static_cast<int64_t>(all.size())) {
    throw nb::index_error("steps outside the launch");
  }
  return nb::bytes(all.data() + begin * outputs, (end - begin) * outputs * sizeof(int32_t));
}

nb::bytes trace(const BoundExecutor& self) {
  const std::vector<TraceRecord> records = self.executor.trace();
  return nb::bytes(records.data(), records.size() * sizeof(TraceRecord));
}

std::pair<int64_t, bool> pair_of(Progress progress) {
  return {progress.completed, progress.running};
}

}  // namespace
}  // namespace tilert

NB_MODULE(_core, m) {
  using namespace tilert;
  using Released = nb::call_guard<nb::gil_scoped_release>;

  m.def(
      "find_isa",
      [](const std::string& wanted) -> std::optional<std::string> {
        const Kernels* kernels = find_kernels(wanted);
        if (!kernels) return std::nullopt;
        return kernels->name;
      },
      "wanted"_a);

  nb::class_<Pool>(m, "Pool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("size", &Pool::size)
      .def(
          "read_rate",
          [](Pool& pool, const std::string& isa, const std::vector<Address>& addresses) {
            return read_rate(pool, kernels_of(isa), memory_of(addresses));
          },
          "isa"_a, "addresses"_a, Released());

  nb::class_<BoundExecutor>(m, "Executor")
      .def(nb::init<std::shared_ptr<Pool>, const std::string&, const nb::bytes&,
                    const std::vector<std::vector<Address>>&, nb::object>(),
           "pool"_a, "isa"_a, "program"_a, "addresses"_a, "owners"_a.none())
      .def(
          "launch",
          [](BoundExecutor& self, int64_t steps, bool trace) {
            self.executor.launch(steps, trace);
          },
          "steps"_a, "trace"_a, Released())
      .def("cancel", [](BoundExecutor& self) { self.executor.cancel(); })
      .def(
          "wait",
          [](BoundExecutor& self, int64_t step, double seconds) {
            return pair_of(self.executor.wait(step, seconds));
          },
          "step"_a, "seconds"_a, Released())
      .def(
          "finish", [](BoundExecutor& self) { return self.executor.finish().completed; },
          Released())
      .def("history", &history, "begin"_a, "end"_a)
      .def("trace", &trace)
      .def(
          "set_wait_limit",
          [](BoundExecutor& self, double seconds) { self.executor.set_wait_limit(seconds); },
          "seconds"_a);
}
