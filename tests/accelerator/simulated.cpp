// A simulated accelerator: PrivateUse1 with two devices, streams that are queues with a worker thread each, and no
// mercy for mistakes.
//
// Memory. `data_ptr()` of a device tensor lies in a range without access rights; the same memory file is mapped a
// second time for the workers. Host code that touches device memory dies at once. Freed memory is filled with a poison
// in the order of its stream and handed out again at once on that stream; a pinned target of an asynchronous copy holds
// a pattern until the copy has run.
//
// Operations. All are asynchronous: the output's shape is learnt from the meta device, and the CPU kernel runs on the
// stream's worker. What has no such form (`item`, `nonzero`, ...) runs there too, and the host waits for it.
//
// Order. A task runs when the mode lets it (see `may_run`). Independently of when it runs, each task has a vector
// clock, made of what its stream, the events it waits for, and the host had seen when it was queued: two accesses that
// it does not order are a race.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_conj_native.h>
#include <ATen/ops/_neg_view_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

namespace py = pybind11;

namespace {

constexpr int kNumDevices = 2;
constexpr int kStreamsPerDevice = 17;  // The default stream, and a pool that is handed out in turn.
constexpr int kNumStreams = kNumDevices * kStreamsPerDevice;
constexpr size_t kDeviceBytes = size_t(4) << 30;
constexpr size_t kGranule = 512;
constexpr int kPoison = 0xDB;   // Of device memory that nobody has written since it was allocated.
constexpr int kPattern = 0xA5;  // Of a pinned target whose copy has not run.

using Clock = std::array<uint64_t, kNumStreams>;

void join(Clock& into, const Clock& other) {
  for (int i = 0; i < kNumStreams; ++i) into[i] = std::max(into[i], other[i]);
}

enum class Mode { Immediate, Random, Lazy, Contrary };

struct Access {
  uintptr_t low, high;
  bool writes;
};

struct PastAccess : Access {
  int stream;
  uint64_t seq;
  std::string name;
};

// One stretch of memory whose accesses are compared: a block of a device, or pinned host memory.
struct Region {
  size_t num_bytes = 0;
  std::vector<PastAccess> past;
  bool is_pinned = false;
  bool is_registered = false;  // By `host_register`; else it is the pinned allocator's.
  int in_flight = 0;           // Queued tasks that touch it.
  bool is_freed = false;       // Pinned memory that was freed while a task was to touch it.
};

struct Task {
  uint64_t seq = 0;
  std::string name;
  std::function<void()> run;
  std::vector<Access> accesses;
  int awaited_stream = -1;  // Of a wait for an event.
  uint64_t awaited_seq = 0;
};

// What a capture, and a thread, may have: as CUDA's `cudaStreamCaptureMode`.
enum CaptureMode { Global, ThreadLocal, Relaxed };

struct Graph {
  std::vector<Task> tasks;
  CaptureMode mode = Global;
  std::thread::id thread = std::this_thread::get_id();
  bool is_spoilt = false;
};

struct StreamState {
  std::deque<Task> queue;
  uint64_t last = 0, done = 0, demand = 0;
  bool is_running = false, has_worker = false;
  Clock clock{};
  Graph* capture = nullptr;
};

struct Event {
  int stream = -1;
  uint64_t seq = 0;
  Clock clock{};
  Graph* capture = nullptr;
};

struct Block {
  int device;
  int stream;
  uintptr_t address;
  size_t num_bytes;
  std::set<int> users;                            // Other streams, from `record_stream`.
  std::vector<std::pair<int, uint64_t>> awaited;  // Once it is freed: what these streams had been given.
};

struct DeviceMemory {
  uintptr_t base = 0;      // Without access rights: what `data_ptr()` says.
  char* shadow = nullptr;  // The same bytes, for the workers.
  size_t used = 0;
  std::map<std::pair<int, size_t>, std::vector<Block*>> free;  // By stream and size.
  std::vector<Block*> leaving;                                 // Freed, in use by other streams.
  size_t num_live = 0;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::array<StreamState, kNumStreams> streams;
  std::array<DeviceMemory, kNumDevices> memory;
  std::array<int, kNumDevices> next_pool_stream{};
  std::map<uintptr_t, Region> regions;
  std::vector<std::string> races;
  std::set<int> contexts;
  Clock host{};
  Mode mode = Mode::Immediate;
  std::mt19937 random{0};
  bool is_paused = false;
  bool has_pinned_memory = true;
  int num_waits = 0;
  std::string failure;  // Of a task; the next wait raises it.
  std::map<std::string, int> injected;
};

State& state() {
  static State* made = new State();  // Never destroyed: the workers never end.
  return *made;
}

thread_local int current_device = 0;
thread_local int capture_mode = Global;
thread_local std::array<int, kNumDevices> current_stream{};  // Numbers within the device.

int stream_index(const c10::Stream& stream) {
  return stream.device_index() * kStreamsPerDevice + static_cast<int>(stream.id());
}

int current_index(int device) { return device * kStreamsPerDevice + current_stream[device]; }

c10::Stream stream_of(int device, int number) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device)),
                     number);
}

// Failures to order.

std::string take_injected(const std::string& kind) {  // With the mutex held.
  auto found = state().injected.find(kind);
  if (found == state().injected.end()) return "";
  if (found->second-- > 0) return "";
  state().injected.erase(found);
  return "injected failure of a simulated " + kind;
}

void fail_if_injected(const std::string& kind) {
  std::string message;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    message = take_injected(kind);
  }
  TORCH_CHECK(message.empty(), message);
}

// Races.

std::map<uintptr_t, Region>::iterator region_at(uintptr_t address) {
  auto& regions = state().regions;
  auto after = regions.upper_bound(address);
  if (after == regions.begin()) return regions.end();
  --after;
  return address < after->first + after->second.num_bytes ? after : regions.end();
}

std::string described(const PastAccess& past) {
  return past.name + (past.writes ? " (writes)" : " (reads)") + " on stream " +
         std::to_string(past.stream % kStreamsPerDevice) + " of device " +
         std::to_string(past.stream / kStreamsPerDevice);
}

void note_access(int stream, uint64_t seq, const Clock& clock, const std::string& name, const Access& access) {
  auto found = region_at(access.low);
  if (found == state().regions.end()) return;
  auto& past = found->second.past;
  PastAccess now{{access.low, access.high, access.writes}, stream, seq, name};
  std::vector<PastAccess> kept;
  for (auto& other : past) {
    // What the host has seen end is before everything that it queues from now on.
    if (state().host[other.stream] >= other.seq) continue;
    bool overlaps = other.low < access.high && access.low < other.high;
    if (overlaps && (other.writes || access.writes) && clock[other.stream] < other.seq) {
      state().races.push_back(described(now) + " is not ordered behind " + described(other));
    }
    bool is_replaced =
        other.stream == stream && other.low == access.low && other.high == access.high && other.writes == access.writes;
    if (!is_replaced) kept.push_back(std::move(other));
  }
  kept.push_back(std::move(now));
  past = std::move(kept);
}

void note_host_access(uintptr_t low, uintptr_t high,
                      const std::string& name) {  // As of memory that is unregistered or freed.
  auto found = region_at(low);
  if (found == state().regions.end()) return;
  for (auto& other : found->second.past) {
    if (other.low < high && low < other.high && state().host[other.stream] < other.seq) {
      state().races.push_back(name + " by the host is not ordered behind " + described(other));
    }
  }
}

// Running.

bool is_done(int stream, uint64_t seq) { return state().streams[stream].done >= seq; }

bool is_ready(const StreamState& stream) {
  if (stream.queue.empty() || stream.is_running) return false;
  const Task& head = stream.queue.front();
  return head.awaited_stream < 0 || is_done(head.awaited_stream, head.awaited_seq);
}

bool is_demanded(const StreamState& stream) {
  return !stream.queue.empty() && stream.queue.front().seq <= stream.demand;
}

bool may_run(const StreamState& stream) {
  State& all = state();
  if (all.is_paused || !is_ready(stream)) return false;
  switch (all.mode) {
    case Mode::Immediate:
    case Mode::Random:
      return true;
    case Mode::Lazy:
      // Only what a wait demands.
      return is_demanded(stream);
    case Mode::Contrary:
      // Before what a wait demands, everything else.
      if (!is_demanded(stream)) return all.num_waits > 0;
      for (const StreamState& other : all.streams) {
        if (other.is_running && other.done + 1 > other.demand) return false;
        if (is_ready(other) && !is_demanded(other)) return false;
      }
      return true;
  }
  return true;
}

void demand(int index, uint64_t seq) {
  StreamState& stream = state().streams[index];
  if (stream.demand >= seq) return;
  stream.demand = seq;
  for (const Task& task : stream.queue) {
    if (task.seq <= seq && task.awaited_stream >= 0) demand(task.awaited_stream, task.awaited_seq);
  }
}

void release_pinned(uintptr_t address);

void work(int index) {
  State& all = state();
  StreamState& stream = all.streams[index];
  std::unique_lock<std::mutex> lock(all.mutex);
  for (;;) {
    all.changed.wait(lock, [&] { return may_run(stream); });
    if (all.mode == Mode::Random && all.random() % 2 == 0) {
      auto pause = std::chrono::microseconds(all.random() % 300);
      lock.unlock();
      std::this_thread::sleep_for(pause);
      lock.lock();
      if (!may_run(stream)) continue;
    }
    Task task = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.is_running = true;
    std::string failure = task.run ? take_injected("run") : "";
    lock.unlock();
    if (failure.empty() && task.run) {
      try {
        task.run();
      } catch (const std::exception& error) {
        failure = task.name + " failed: " + error.what();
      }
    }
    task.run = nullptr;
    lock.lock();
    if (all.failure.empty()) all.failure = failure;
    std::vector<uintptr_t> freed;
    for (const Access& access : task.accesses) {
      auto found = region_at(access.low);
      if (found != all.regions.end() && --found->second.in_flight == 0 && found->second.is_freed)
        freed.push_back(found->first);
    }
    for (uintptr_t address : freed) release_pinned(address);
    stream.is_running = false;
    stream.done = task.seq;
    all.changed.notify_all();
  }
}

// What is unsafe during a capture is forbidden by this thread's own captures and, where it has the global mode, by those
// of others that have it too: whoever does it all the same spoils them.
void spoil_captures_locked(const char* what) {
  bool is_permitted = true;
  for (StreamState& stream : state().streams) {
    Graph* graph = stream.capture;
    if (graph == nullptr || graph->mode == Relaxed || capture_mode == Relaxed) continue;
    bool is_own = graph->thread == std::this_thread::get_id();
    if (!is_own && (capture_mode == ThreadLocal || graph->mode == ThreadLocal)) continue;
    graph->is_spoilt = true;
    is_permitted = false;
  }
  TORCH_CHECK(is_permitted, what, " is not permitted while a stream captures; the capture is spoilt");
}

void spoil_captures(const char* what) {
  std::lock_guard<std::mutex> lock(state().mutex);
  spoil_captures_locked(what);
}

// Whoever asks for the end of what is captured spoils it, in every mode.
void spoil_captured(const char* what, Graph* graph) {
  if (graph == nullptr) return;
  graph->is_spoilt = true;
  TORCH_CHECK(false, what, " is not permitted for what is being captured; the capture is spoilt");
}

// With the mutex held. Returns the number of the task in its stream.
uint64_t enqueue_locked(int index, Task task) {
  State& all = state();
  StreamState& stream = all.streams[index];
  all.contexts.insert(index / kStreamsPerDevice);
  if (stream.capture != nullptr) {
    stream.capture->tasks.push_back(std::move(task));
    return 0;
  }
  if (!stream.has_worker) {
    stream.has_worker = true;
    std::thread(work, index).detach();
  }
  task.seq = ++stream.last;
  join(stream.clock, all.host);
  stream.clock[index] = task.seq;
  for (const Access& access : task.accesses) {
    note_access(index, task.seq, stream.clock, task.name, access);
    auto found = region_at(access.low);
    if (found != all.regions.end()) ++found->second.in_flight;
  }
  uint64_t seq = task.seq;
  stream.queue.push_back(std::move(task));
  all.changed.notify_all();
  return seq;
}

uint64_t enqueue(int index, std::string name, std::function<void()> run, std::vector<Access> accesses = {}) {
  Task task;
  task.name = std::move(name);
  task.run = std::move(run);
  // Accesses outside all regions are of no interest, and must not be counted when they end.
  std::lock_guard<std::mutex> lock(state().mutex);
  for (const Access& access : accesses) {
    if (access.low < access.high && region_at(access.low) != state().regions.end()) task.accesses.push_back(access);
  }
  return enqueue_locked(index, std::move(task));
}

// Waiting.

std::function<std::string(std::string)>* on_host_wait = nullptr;

void tell_host_wait(const char* kind) {
  if (on_host_wait == nullptr) return;
  py::gil_scoped_acquire gil;
  std::string refusal = (*on_host_wait)(kind);
  TORCH_CHECK(refusal.empty(), refusal);
}

using Targets = std::vector<std::pair<int, uint64_t>>;

void host_wait(const char* kind, const Targets& targets, const Clock& clock) {
  tell_host_wait(kind);
  spoil_captures(kind);
  State& all = state();
  std::string failure;
  {
    std::unique_lock<std::mutex> lock(all.mutex);
    ++all.num_waits;
    for (auto& [stream, seq] : targets) demand(stream, seq);
    all.changed.notify_all();
    all.changed.wait(lock, [&] {
      return std::all_of(targets.begin(), targets.end(),
                         [](auto& target) { return is_done(target.first, target.second); });
    });
    --all.num_waits;
    join(all.host, clock);
    failure.swap(all.failure);
  }
  TORCH_CHECK(failure.empty(), failure);
}

void wait_for_streams(const char* kind, int first, int end) {
  Targets targets;
  Clock clock{};
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    for (int i = first; i < end; ++i) {
      spoil_captured(kind, state().streams[i].capture);
      targets.emplace_back(i, state().streams[i].last);
      join(clock, state().streams[i].clock);
    }
  }
  host_wait(kind, targets, clock);
}

// Device memory.

char* shadow_of(const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  for (const DeviceMemory& memory : state().memory) {
    if (address >= memory.base && address < memory.base + kDeviceBytes) return memory.shadow + (address - memory.base);
  }
  TORCH_CHECK(false, "no device memory at this address");
}

void map_devices() {
  for (DeviceMemory& memory : state().memory) {
    int file = memfd_create("simulated-accelerator", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, kDeviceBytes) == 0, "no memory file for a simulated device");
    void* base = mmap(nullptr, kDeviceBytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    void* shadow = mmap(nullptr, kDeviceBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    TORCH_CHECK(base != MAP_FAILED && shadow != MAP_FAILED, "no address space for a simulated device");
    close(file);
    memory.base = reinterpret_cast<uintptr_t>(base);
    memory.shadow = static_cast<char*>(shadow);
  }
}

// With the mutex held: the memory is free again; what its stream runs from now on may be given it.
void put_back(Block* block) {
  DeviceMemory& memory = state().memory[block->device];
  StreamState& stream = state().streams[block->stream];
  block->users.clear();
  block->awaited.clear();
  if (stream.capture != nullptr) return;  // A graph's memory stays its own.
  Task poison;
  poison.name = "poison of freed memory";
  char* low = memory.shadow + (block->address - memory.base);
  poison.run = [low, num_bytes = block->num_bytes] { std::memset(low, kPoison, num_bytes); };
  poison.accesses = {{block->address, block->address + block->num_bytes, true}};
  enqueue_locked(block->stream, std::move(poison));
  memory.free[{block->stream, block->num_bytes}].push_back(block);
}

void put_back_finished(DeviceMemory& memory) {
  std::vector<Block*> still;
  for (Block* block : std::exchange(memory.leaving, {})) {
    bool is_over = std::all_of(block->awaited.begin(), block->awaited.end(),
                               [](auto& use) { return is_done(use.first, use.second); });
    if (!is_over) {
      still.push_back(block);
      continue;
    }
    for (auto& [stream, seq] : block->awaited) state().host[stream] = std::max(state().host[stream], seq);
    put_back(block);
  }
  memory.leaving.insert(memory.leaving.end(), still.begin(), still.end());
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  std::lock_guard<std::mutex> lock(state().mutex);
  DeviceMemory& memory = state().memory[block->device];
  --memory.num_live;
  for (int user : block->users) block->awaited.emplace_back(user, state().streams[user].last);
  if (block->awaited.empty()) {
    put_back(block);
  } else {
    memory.leaving.push_back(block);
  }
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    c10::Device device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(current_device));
    if (num_bytes == 0) return {nullptr, nullptr, &free_block, device};
    fail_if_injected("alloc");
    size_t size = (num_bytes + kGranule - 1) / kGranule * kGranule;
    std::lock_guard<std::mutex> lock(state().mutex);
    state().contexts.insert(current_device);
    DeviceMemory& memory = state().memory[current_device];
    put_back_finished(memory);
    int stream = current_index(current_device);
    auto& fitting = memory.free[{stream, size}];
    Block* block = nullptr;
    if (!fitting.empty()) {
      block = fitting.back();
      fitting.pop_back();
    } else {
      // torch's allocator lets the thread that captures allocate.
      if (state().streams[stream].capture == nullptr) spoil_captures_locked("allocating device memory");
      TORCH_CHECK_WITH(OutOfMemoryError, memory.used + size <= kDeviceBytes, "simulated device ", current_device,
                       " is out of memory");
      block = new Block{current_device, stream, memory.base + memory.used, size, {}, {}};
      std::memset(memory.shadow + memory.used, kPoison, size);
      memory.used += size;
      state().regions[block->address].num_bytes = size;
    }
    ++memory.num_live;
    return {reinterpret_cast<void*>(block->address), block, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "device memory cannot be cloned by the host");
  }
};

DeviceAllocator device_allocator;

// Pinned memory.

void add_pinned(uintptr_t address, size_t num_bytes, bool is_registered) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().contexts.insert(current_device);
  auto next = state().regions.lower_bound(address);
  bool is_taken = region_at(address) != state().regions.end() ||
                  (next != state().regions.end() && next->first < address + num_bytes);
  TORCH_CHECK(!is_taken, "this memory is registered already");
  Region& region = state().regions[address];
  region.num_bytes = num_bytes;
  region.is_pinned = true;
  region.is_registered = is_registered;
}

void release_pinned(uintptr_t address) {  // With the mutex held.
  munmap(reinterpret_cast<void*>(address), state().regions[address].num_bytes);
  state().regions.erase(address);
}

void free_pinned(void* pointer) {
  std::lock_guard<std::mutex> lock(state().mutex);
  auto address = reinterpret_cast<uintptr_t>(pointer);
  Region& region = state().regions[address];
  // As torch's own allocator: not before the copies that use it have run.
  if (region.in_flight > 0) {
    region.is_freed = true;
  } else {
    release_pinned(address);
  }
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes == 0) return {nullptr, c10::kCPU};
    TORCH_CHECK(state().has_pinned_memory, "this simulated device has no pinned memory");
    fail_if_injected("pin");
    spoil_captures("pinning memory");
    size_t size = (num_bytes + 4095) / 4096 * 4096;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory to pin");
    add_pinned(reinterpret_cast<uintptr_t>(memory), size, false);
    return {memory, memory, &free_pinned, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }
};

PinnedAllocator pinned_allocator;

void host_register(uintptr_t address, size_t num_bytes) {
  fail_if_injected("pin");
  spoil_captures("pinning memory");
  add_pinned(address, num_bytes, true);
}

void host_unregister(uintptr_t address) {
  spoil_captures("unpinning memory");
  std::lock_guard<std::mutex> lock(state().mutex);
  auto found = state().regions.find(address);
  TORCH_CHECK(found != state().regions.end() && found->second.is_registered, "this memory is not registered");
  note_host_access(address, address + found->second.num_bytes, "unregistering");
  state().regions.erase(found);
}

bool is_pinned(const void* low, size_t num_bytes = 1) {
  std::lock_guard<std::mutex> lock(state().mutex);
  auto address = reinterpret_cast<uintptr_t>(low);
  auto found = region_at(address);
  return found != state().regions.end() && found->second.is_pinned &&
         address + num_bytes <= found->first + found->second.num_bytes;
}

// torch's interfaces.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }

  void enter(c10::Device device) const {
    TORCH_CHECK(device.index() >= 0 && device.index() < kNumDevices, "there is no simulated device ", device.index());
    std::lock_guard<std::mutex> lock(state().mutex);
    if (current_device != device.index()) state().contexts.insert(device.index());
    current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    enter(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kPrivateUse1, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override { enter(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }

  static int index_or_current(c10::Device device) { return device.has_index() ? device.index() : current_device; }
  c10::Stream getStream(c10::Device device) const override {
    int index = index_or_current(device);
    return stream_of(index, current_stream[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(index_or_current(device), 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    fail_if_injected("stream");
    spoil_captures("making a stream");
    std::lock_guard<std::mutex> lock(state().mutex);
    int index = index_or_current(device);
    state().contexts.insert(index);
    int& next = state().next_pool_stream[index];
    next = next % (kStreamsPerDevice - 1) + 1;
    return stream_of(index, next);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    current_stream[stream.device_index()] = static_cast<int>(stream.id());
    return before;
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device,
              const c10::EventFlag) const override {
    TORCH_CHECK(device < 0 || device == stream.device_index(), "an event of simulated device ", int(device),
                " was recorded on a stream of device ", int(stream.device_index()));
    fail_if_injected("event");
    if (*event == nullptr) {
      if (state().streams[stream_index(stream)].capture == nullptr) spoil_captures("making an event");
      *event = new Event();
    }
    auto* recorded = static_cast<Event*>(*event);
    int index = stream_index(stream);
    std::lock_guard<std::mutex> lock(state().mutex);
    Task marker;
    marker.name = "event";
    uint64_t seq = enqueue_locked(index, std::move(marker));
    StreamState& on = state().streams[index];
    *recorded = Event{index, seq, on.clock, on.capture};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    const auto& awaited = *static_cast<Event*>(event);
    if (awaited.stream < 0) return;
    int index = stream_index(stream);
    std::lock_guard<std::mutex> lock(state().mutex);
    StreamState& waiting = state().streams[index];
    if (waiting.capture != awaited.capture) {
      for (Graph* graph : {waiting.capture, awaited.capture})
        if (graph != nullptr) graph->is_spoilt = true;
      TORCH_CHECK(
          false,
          "a stream that captures cannot wait for an event from outside of the capture, nor the other way round");
    }
    Task wait;
    wait.name = "wait for an event";
    if (waiting.capture == nullptr) {
      wait.awaited_stream = awaited.stream;
      wait.awaited_seq = awaited.seq;
      join(waiting.clock, awaited.clock);
    }
    enqueue_locked(index, std::move(wait));
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    const auto& asked = *static_cast<Event*>(event);
    std::lock_guard<std::mutex> lock(state().mutex);
    spoil_captures_locked("event.query");
    spoil_captured("event.query", asked.capture);
    if (asked.stream >= 0 && !is_done(asked.stream, asked.seq)) return false;
    join(state().host, asked.clock);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    const auto& awaited = *static_cast<Event*>(event);
    spoil_captured("event.synchronize", awaited.capture);
    if (awaited.stream >= 0) host_wait("event.synchronize", {{awaited.stream, awaited.seq}}, awaited.clock);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }

  bool queryStream(const c10::Stream& stream) const override {
    std::lock_guard<std::mutex> lock(state().mutex);
    const StreamState& asked = state().streams[stream_index(stream)];
    spoil_captured("stream.query", asked.capture);
    return asked.done >= asked.last;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    int index = stream_index(stream);
    wait_for_streams("stream.synchronize", index, index + 1);
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    wait_for_streams("device.synchronize", device * kStreamsPerDevice, (device + 1) * kStreamsPerDevice);
  }
  bool isStreamCapturing(const c10::Stream& stream) const {  // Overrides from torch 2.11 on.
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().streams[stream_index(stream)].capture != nullptr;
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    if (pointer.get() == nullptr || pointer.get_deleter() != &free_block) return;
    auto* block = static_cast<Block*>(pointer.get_context());
    std::lock_guard<std::mutex> lock(state().mutex);
    if (stream_index(stream) != block->stream) block->users.insert(stream_index(stream));
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    TORCH_CHECK(false, "a simulated device has no clock");
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().contexts.count(device) > 0;
  }
  c10::DeviceIndex deviceCount() const override { return kNumDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard().enter({c10::kPrivateUse1, device}); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice({c10::kPrivateUse1, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    auto before = getCurrentDevice();
    Guard().uncheckedSetDevice({c10::kPrivateUse1, device});
    return before;
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void* data) const override {
    auto address = reinterpret_cast<uintptr_t>(data);
    auto& memory = state().memory;
    int device = address >= memory[1].base && address < memory[1].base + kDeviceBytes ? 1 : 0;
    return {c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device)};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    auto* implementation = storage.unsafeGetStorageImpl();
    c10::DeviceGuard guard(storage.device());
    c10::DataPtr fresh = device_allocator.allocate(num_bytes);
    size_t kept = std::min(num_bytes, storage.nbytes());
    if (kept > 0) {
      auto low = reinterpret_cast<uintptr_t>(storage.data()), target = reinterpret_cast<uintptr_t>(fresh.get());
      enqueue(current_index(current_device), "resize",
              [from = shadow_of(storage.data()), to = shadow_of(fresh.get()), kept] { std::memcpy(to, from, kept); },
              {{low, low + kept, false}, {target, target + kept, true}});
    }
    implementation->set_data_ptr_noswap(std::move(fresh));
    implementation->set_nbytes(num_bytes);
  }
};

// Operations.

// A tensor as a kernel's argument: it keeps no memory alive, as no launched kernel does.
struct Argument {
  char* data = nullptr;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
  bool is_conj = false, is_neg = false;
  at::Tensor host;  // A tensor on the CPU, by value.

  at::Tensor on_cpu() const {
    if (host.defined()) return host;
    at::Tensor made = at::from_blob(data, sizes, strides, at::TensorOptions().dtype(dtype));
    if (is_conj) made._set_conj(true);
    if (is_neg) made._set_neg(true);
    return made;
  }
};

Access extent_of(const at::Tensor& tensor, bool writes) {
  if (tensor.numel() == 0) return {0, 0, writes};
  auto low = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {low, low + (last + 1) * tensor.element_size(), writes};
}

Argument as_argument(const at::Tensor& tensor, bool by_reference = false) {
  Argument made;
  if (tensor.device().is_cpu() && !by_reference) {
    made.host = tensor.clone();
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.host.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }
  made.sizes = tensor.sizes().vec();
  made.strides = tensor.strides().vec();
  made.dtype = tensor.scalar_type();
  made.is_conj = tensor.is_conj();
  made.is_neg = tensor.is_neg();
  if (tensor.numel() > 0) {
    made.data = tensor.device().is_cpu() ? static_cast<char*>(tensor.data_ptr()) : shadow_of(tensor.data_ptr());
  }
  return made;
}

at::Tensor on_meta(const at::Tensor& tensor) {
  if (tensor.device().is_cpu() && tensor.dim() == 0) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
}

using Convert = std::function<at::Tensor(const at::Tensor&)>;

c10::IValue converted(const c10::IValue& value, const Convert& convert, c10::Device device) {
  if (value.isTensor()) return value.toTensor().defined() ? convert(value.toTensor()) : value.toTensor();
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(convert(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      list.push_back(tensor.has_value() && tensor->defined() ? std::optional<at::Tensor>(convert(*tensor))
                                                             : std::nullopt);
    }
    return list;
  }
  if (value.isDevice()) return device;
  return value;
}

void for_each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& visit) {
  converted(
      value,
      [&](const at::Tensor& tensor) {
        visit(tensor);
        return tensor;
      },
      c10::kCPU);
}

struct Call {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  int device = -1;

  Call(const c10::OperatorHandle& called, torch::jit::Stack* stack) : op(called) {
    size_t count = op.schema().arguments().size();
    arguments.assign(std::make_move_iterator(stack->end() - count), std::make_move_iterator(stack->end()));
    stack->erase(stack->end() - count, stack->end());
    for (const c10::IValue& value : arguments) {
      for_each_tensor(value, [&](const at::Tensor& tensor) {
        if (!tensor.is_privateuseone()) return;
        TORCH_CHECK(device < 0 || device == tensor.device().index(), op.schema().name(),
                    ": tensors on two simulated devices");
        device = tensor.device().index();
      });
    }
    if (device < 0) device = current_device;
  }

  std::vector<Access> accesses() const {
    std::vector<Access> found;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = op.schema().arguments()[i].alias_info();
      bool writes = alias != nullptr && alias->isWrite();
      for_each_tensor(arguments[i], [&](const at::Tensor& tensor) {
        if (tensor.is_privateuseone()) found.push_back(extent_of(tensor, writes));
      });
    }
    return found;
  }

  // The same call on CPU tensors over the same memory, to be made by a worker.
  std::function<torch::jit::Stack()> on_worker() const {
    std::vector<std::vector<Argument>> described;
    for (const c10::IValue& value : arguments) {
      auto& those = described.emplace_back();
      for_each_tensor(value, [&](const at::Tensor& tensor) { those.push_back(as_argument(tensor)); });
    }
    // Of tensors only their kind is kept: a value that holds the tensor would hold its memory.
    std::vector<c10::IValue> shapes;
    for (const c10::IValue& value : arguments)
      shapes.push_back(converted(value, [](const at::Tensor&) { return at::Tensor(); }, c10::kCPU));
    std::vector<c10::IValue> plain;
    for (size_t i = 0; i < shapes.size(); ++i) plain.push_back(described[i].empty() ? arguments[i] : shapes[i]);
    for (auto& value : plain) {
      if (value.isDevice()) value = c10::Device(c10::kCPU);
    }
    return [op = op, plain, described, kinds = kinds_of()] {
      torch::jit::Stack stack;
      for (size_t i = 0; i < plain.size(); ++i) stack.push_back(rebuilt(kinds[i], plain[i], described[i]));
      at::AutoDispatchBelowAutograd below;
      op.callBoxed(&stack);
      return stack;
    };
  }

  enum class Kind { Other, One, List, Optional };

  std::vector<std::pair<Kind, std::vector<bool>>> kinds_of() const {
    std::vector<std::pair<Kind, std::vector<bool>>> kinds;
    for (const c10::IValue& value : arguments) {
      std::vector<bool> present;
      Kind kind = Kind::Other;
      if (value.isTensor() && value.toTensor().defined()) kind = Kind::One;
      if (value.isTensorList()) kind = Kind::List;
      if (value.isOptionalTensorList()) {
        kind = Kind::Optional;
        for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
          present.push_back(tensor.has_value() && tensor->defined());
      }
      kinds.emplace_back(kind, present);
    }
    return kinds;
  }

  static c10::IValue rebuilt(const std::pair<Kind, std::vector<bool>>& kind, const c10::IValue& plain,
                             const std::vector<Argument>& those) {
    if (kind.first == Kind::One) return those[0].on_cpu();
    if (kind.first == Kind::List) {
      c10::List<at::Tensor> list;
      for (const Argument& one : those) list.push_back(one.on_cpu());
      return list;
    }
    if (kind.first == Kind::Optional) {
      c10::List<std::optional<at::Tensor>> list;
      size_t next = 0;
      for (bool is_present : kind.second)
        list.push_back(is_present ? std::optional<at::Tensor>(those[next++].on_cpu()) : std::nullopt);
      return list;
    }
    return plain;
  }
};

bool is_fresh(const c10::Argument& returned) {
  auto kind = returned.type()->kind();
  bool is_list =
      kind == c10::TypeKind::ListType && returned.type()->containedType(0)->kind() == c10::TypeKind::TensorType;
  return returned.alias_info() == nullptr && (kind == c10::TypeKind::TensorType || is_list);
}

// For a return that is one of the arguments: which.
int returned_argument(const c10::FunctionSchema& schema, const c10::Argument& returned) {
  if (returned.alias_info() == nullptr || !returned.alias_info()->isWrite()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite() && alias->beforeSets() == returned.alias_info()->beforeSets())
      return static_cast<int>(i);
  }
  return -1;
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  size_t needed = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  if (needed > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// What the call would return, from the meta device; false where that cannot tell. Outputs that are given are resized as
// they would be.
bool learn_shapes(const Call& call, torch::jit::Stack* outcome) {
  const auto& schema = call.op.schema();
  for (const auto& returned : schema.returns()) {
    if (!is_fresh(returned) && returned_argument(schema, returned) < 0) return false;
  }
  try {
    at::AutoDispatchBelowAutograd below;
    std::vector<c10::IValue> given;
    for (const c10::IValue& value : call.arguments) given.push_back(converted(value, on_meta, c10::kMeta));
    *outcome = given;
    call.op.callBoxed(outcome);
    for (size_t i = 0; i < given.size(); ++i) {
      if (!given[i].isTensor() || !given[i].toTensor().defined()) continue;
      const at::Tensor &actual = call.arguments[i].toTensor(), &wanted = given[i].toTensor();
      if (actual.is_privateuseone() && !wanted.sizes().equals(actual.sizes())) {
        resize_(actual, wanted.sizes(), std::nullopt);
        actual.unsafeGetTensorImpl()->set_sizes_and_strides(wanted.sizes(), wanted.strides());
      }
    }
    return true;
  } catch (const std::exception& error) {
    // Where nothing new is returned, nothing has to be known; other refusals are for the kernel itself to repeat.
    bool is_in_place = schema.name().back() == '_' && schema.overload_name().find("out") == std::string::npos;
    return is_in_place && std::string(error.what()).find("Meta") != std::string::npos;
  }
}

at::Tensor copied_to_device(const at::Tensor& source, int device) {
  at::Tensor made = at::empty_strided(source.sizes(), source.strides(),
                                      source.options().device(c10::Device(c10::kPrivateUse1, device)));
  return made.copy_(source);
}

void run_synchronously(Call& call, torch::jit::Stack* stack) {
  const auto& schema = call.op.schema();
  auto result = std::make_shared<torch::jit::Stack>();
  auto failure = std::make_shared<std::exception_ptr>();
  int index = current_index(call.device);
  uint64_t seq = enqueue(
      index, schema.name(),
      [run = call.on_worker(), result, failure] {
        try {
          for (const c10::IValue& value : run()) {
            // Out of the device's memory.
            result->push_back(converted(value, [](const at::Tensor& tensor) { return tensor.clone(); }, c10::kCPU));
          }
        } catch (...) {
          *failure = std::current_exception();
        }
      },
      call.accesses());
  Clock clock;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    clock = state().streams[index].clock;
  }
  host_wait(schema.name().c_str(), {{index, seq}}, clock);
  if (*failure) std::rethrow_exception(*failure);
  for (size_t i = 0; i < result->size(); ++i) {
    int argument = returned_argument(schema, schema.returns()[i]);
    if (argument >= 0) {
      stack->push_back(call.arguments[argument]);
    } else {
      stack->push_back(converted(
          (*result)[i], [&](const at::Tensor& tensor) { return copied_to_device(tensor, call.device); }, c10::kCPU));
    }
  }
}

// For all operations that have no kernel of their own below.
void run_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op, stack);
  c10::DeviceGuard guard(c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(call.device)));
  fail_if_injected("launch");
  torch::jit::Stack shapes;
  if (!learn_shapes(call, &shapes)) return run_synchronously(call, stack);
  const auto& schema = op.schema();
  std::vector<std::vector<Argument>> outputs;
  std::vector<Access> accesses = call.accesses();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto& those = outputs.emplace_back();
    int argument = returned_argument(schema, schema.returns()[i]);
    if (argument >= 0) {
      stack->push_back(call.arguments[argument]);
      continue;
    }
    stack->push_back(converted(
        shapes[i],
        [&](const at::Tensor& shape) {
          at::Tensor made = at::empty_strided(shape.sizes(), shape.strides(),
                                              shape.options().device(c10::Device(c10::kPrivateUse1, call.device)));
          those.push_back(as_argument(made));
          accesses.push_back(extent_of(made, true));
          return made;
        },
        c10::kCPU));
  }
  enqueue(
      current_index(call.device), schema.name(),
      [run = call.on_worker(), outputs] {
        torch::jit::Stack results = run();
        for (size_t i = 0; i < outputs.size(); ++i) {
          size_t next = 0;
          if (outputs[i].empty()) continue;
          for_each_tensor(results[i], [&](const at::Tensor& tensor) { outputs[i][next++].on_cpu().copy_(tensor); });
        }
      },
      accesses);
}

void enqueue_copy(int index, const at::Tensor& target, const at::Tensor& source, bool keeps_source) {
  Argument to = as_argument(target, true), from = as_argument(source, !keeps_source);
  enqueue(index, "copy", [to, from] { to.on_cpu().copy_(from.on_cpu()); },
          {extent_of(target, true), extent_of(source, false)});
}

void order_behind(int later, int earlier) {
  Guard guard;
  void* event = nullptr;
  guard.record(&event, stream_of(earlier / kStreamsPerDevice, earlier % kStreamsPerDevice), -1,
               c10::EventFlag::PYTORCH_DEFAULT);
  guard.block(event, stream_of(later / kStreamsPerDevice, later % kStreamsPerDevice));
  guard.destroyEvent(event, -1);
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& given, bool non_blocking) {
  if (self.numel() == 0 || self.is_same(given)) return self;
  fail_if_injected("copy");
  at::Tensor source = given.sizes().equals(self.sizes()) ? given : given.expand_as(self);
  bool to_host = self.device().is_cpu(), from_host = source.device().is_cpu();
  int device = to_host ? source.device().index() : self.device().index();
  int index = current_index(device);
  bool is_async = non_blocking;
  if (to_host) {
    Access range = extent_of(self, true);
    is_async = is_async && is_pinned(self.data_ptr(), range.high - range.low);
    if (is_async && self.is_non_overlapping_and_dense()) std::memset(self.data_ptr(), kPattern, range.high - range.low);
    enqueue_copy(index, self, source, false);
  } else if (from_host) {
    Access range = extent_of(source, false);
    // Pageable memory is read before the call returns.
    enqueue_copy(index, self, source, !(is_async && is_pinned(source.data_ptr(), range.high - range.low)));
  } else if (source.device() != self.device()) {
    int other = current_index(source.device().index());
    order_behind(other, index);
    enqueue_copy(other, self, source, false);
    order_behind(index, other);
    is_async = true;
  } else {
    enqueue_copy(index, self, source, false);
    is_async = true;
  }
  if (!is_async) wait_for_streams("a copy that is not asynchronous", index, index + 1);
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  at::Tensor to = target;
  return copy_(to, source, non_blocking);
}

at::Tensor empty_on(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<c10::Device> device) {
  c10::DeviceGuard guard(
      device.value_or(c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(current_device))));
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::kFloat));
  int64_t count = c10::multiply_integers(sizes);
  size_t num_bytes = count * type.itemsize();
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), num_bytes,
                                                       device_allocator.allocate(num_bytes), &device_allocator, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                       c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
  made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return made;
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  at::Tensor made = empty_on(sizes, dtype, device);
  if (format.has_value() && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve) {
    made.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return made;
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  int64_t count = c10::multiply_integers(sizes) == 0 ? 0 : 1;
  for (size_t i = 0; count > 0 && i < sizes.size(); ++i) count += (sizes[i] - 1) * strides[i];
  at::Tensor made = empty_on({count}, dtype, device);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                        c10::IntArrayRef strides) {
  return at::cpu::set_(self, storage, offset, sizes, strides);
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  int64_t count = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return at::cpu::set_(self, storage, 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_boxed>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("resize_", resize_);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("view.dtype", TORCH_FN(at::native::view_dtype));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("_conj", TORCH_FN(at::native::_conj));
  library.impl("_neg_view", TORCH_FN(at::native::_neg_view));
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("record_stream", record_stream);
}

// Graphs.

void begin_capture(int device, int number, int mode) {
  std::lock_guard<std::mutex> lock(state().mutex);
  StreamState& stream = state().streams[device * kStreamsPerDevice + number];
  TORCH_CHECK(stream.capture == nullptr, "this stream captures already");
  stream.capture = new Graph{{}, static_cast<CaptureMode>(mode)};
}

uintptr_t end_capture(int device, int number) {
  std::lock_guard<std::mutex> lock(state().mutex);
  StreamState& stream = state().streams[device * kStreamsPerDevice + number];
  auto* graph = std::exchange(stream.capture, nullptr);
  TORCH_CHECK(!graph->is_spoilt, "the capture was spoilt by an operation that is not permitted meanwhile");
  return reinterpret_cast<uintptr_t>(graph);
}

void replay(uintptr_t graph, int device, int number) {
  for (const Task& task : reinterpret_cast<Graph*>(graph)->tasks) {
    if (task.run) enqueue(device * kStreamsPerDevice + number, task.name + " (replayed)", task.run, task.accesses);
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  map_devices();
  c10::SetAllocator(c10::kPrivateUse1, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  module.attr("num_devices") = kNumDevices;
  module.attr("poison") = kPoison;
  module.attr("pattern") = kPattern;
  module.def(
      "set_mode",
      [](const std::string& name, unsigned seed) {
        static const std::map<std::string, Mode> modes = {{"immediate", Mode::Immediate},
                                                          {"random", Mode::Random},
                                                          {"lazy", Mode::Lazy},
                                                          {"contrary", Mode::Contrary}};
        std::lock_guard<std::mutex> lock(state().mutex);
        state().mode = modes.at(name);
        state().random.seed(seed);
        state().changed.notify_all();
      },
      Unlocked());
  module.def(
      "set_paused",
      [](bool is_paused) {
        std::lock_guard<std::mutex> lock(state().mutex);
        state().is_paused = is_paused;
        state().changed.notify_all();
      },
      Unlocked());
  module.def("set_has_pinned_memory", [](bool has) { state().has_pinned_memory = has; });
  module.def("on_host_wait", [](std::function<std::string(std::string)> told) {
    on_host_wait = new std::function<std::string(std::string)>(std::move(told));
  });
  module.def("inject", [](const std::string& kind, int after) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().injected[kind] = after;
  });
  module.def("take_back_injected", [] {
    // Returns what has not struck.
    std::lock_guard<std::mutex> lock(state().mutex);
    state().failure.clear();
    return std::exchange(state().injected, {});
  });
  module.def("take_races", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    return std::exchange(state().races, {});
  });
  module.def(
      "drain",
      [] {
        // Runs everything. No wait of the program's: it is not told, and orders nothing.
        State& all = state();
        std::unique_lock<std::mutex> lock(all.mutex);
        ++all.num_waits;
        for (int i = 0; i < kNumStreams; ++i) demand(i, all.streams[i].last);
        all.changed.notify_all();
        all.changed.wait(lock, [&] {
          return std::all_of(all.streams.begin(), all.streams.end(),
                             [](auto& stream) { return stream.done >= stream.last; });
        });
        --all.num_waits;
      },
      Unlocked());
  module.def("forget_past", [] {
    // After `drain`: everything that has run is before everything that is queued from now on.
    std::lock_guard<std::mutex> lock(state().mutex);
    for (auto& stream : state().streams) join(state().host, stream.clock);
    for (auto& [address, region] : state().regions) region.past.clear();
    state().races.clear();
    state().contexts.clear();
    state().failure.clear();
    state().injected.clear();
  });
  module.def("host_register", &host_register, Unlocked());
  module.def("host_unregister", &host_unregister, Unlocked());
  module.def("num_registered", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    return std::count_if(state().regions.begin(), state().regions.end(),
                         [](auto& one) { return one.second.is_registered; });
  });
  module.def("num_pinned", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    return std::count_if(state().regions.begin(), state().regions.end(),
                         [](auto& one) { return one.second.is_pinned; });
  });
  module.def("is_in_flight", [](uintptr_t address) {
    // Whether a queued task is to touch the pinned memory there.
    std::lock_guard<std::mutex> lock(state().mutex);
    auto found = region_at(address);
    return found != state().regions.end() && found->second.in_flight > 0;
  });
  module.def("num_live_blocks", [](int device) {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().memory[device].num_live;
  });
  module.def("take_contexts", [] {
    std::lock_guard<std::mutex> lock(state().mutex);
    return std::exchange(state().contexts, {});
  });
  module.def("is_capturing", [](int device, int number) {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().streams[device * kStreamsPerDevice + number].capture != nullptr;
  });
  module.def("exchange_capture_mode", [](int mode) { return std::exchange(capture_mode, mode); });
  module.def("begin_capture", &begin_capture);
  module.def("end_capture", &end_capture);
  module.def("replay", &replay, Unlocked());
}
