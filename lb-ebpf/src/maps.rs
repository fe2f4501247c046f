//! The maps, behind functions. All that packets need are arrays, but the allow list: a look-up is a comparison and an
//! addition.
//!
//! The daemon maps most of them into its memory and changes words in place; the layouts (`lb_common::layout`) and, for
//! slots, `lb_common::flow` say which side may change which word, and how.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    helpers::{bpf_get_smp_processor_id, bpf_jiffies64, bpf_loop},
    macros::btf_map,
};
use lb_common::{
    cell::{Cell8, Cell16, Cell64},
    flight_recorder::{self, Note, RECORDS_MIN, Record},
    flow::Family,
    layout::{
        AllowKey, BACKENDS, Backend, Config, Control, FOLLOWED, Followed, Listener, NEXT_HOPS, Numbers,
        Numbers4, OverflowMarks, ReturnHops, SELECTION_HALVES, SELECTION_WORDS, SERVICES, SETS_PER_ADDRESS,
        Service, Set4, Set6, SourceBudgets, WAYS, allow_key,
    },
    maps::{LoopBody, Maps},
    outcome::{COUNTERS, Counter, Event},
    tables::FlowTables,
};

use crate::barrier::{barrier_index, barrier_var};

const MAPPED: usize = BPF_F_MMAPABLE as usize;
/// Sets of one SNAT address: the loader multiplies these maps by the number of addresses.
const SETS: usize = SETS_PER_ADDRESS as usize;

#[btf_map]
static CONTROL: Array<Control, 1, MAPPED> = Array::new();
/// Selection tables, two halves for each service and family, eight entries to a word.
#[btf_map]
static SELECTION: Array<u64, { (SELECTION_HALVES * SELECTION_WORDS) as usize }, MAPPED> = Array::new();
#[btf_map]
static FLOW4: Array<Set4, SETS, MAPPED> = Array::new();
#[btf_map]
static FLOW6: Array<Set6, SETS, MAPPED> = Array::new();
/// What both ends of the flows in `FLOW4` have said.
#[btf_map]
static NUMBERS4: Array<Numbers4, SETS, MAPPED> = Array::new();
#[btf_map]
static RETURN_HOP6: Array<ReturnHops, SETS, MAPPED> = Array::new();
#[btf_map]
static OVERFLOW6: Array<OverflowMarks, { SETS / 8 }, MAPPED> = Array::new();
/// Ports that must not become slots, by bit; the same for every address.
#[btf_map]
static BLOCKED: Array<u64, { 65_536 / 64 }, MAPPED> = Array::new();
/// Learned ways back to clients: see `NextHop`.
#[btf_map]
static NEXT_HOP: Array<u64, { NEXT_HOPS as usize }, MAPPED> = Array::new();
/// What sources of flows use, and may use.
#[btf_map]
static SOURCES: Array<SourceBudgets, 1, MAPPED> = Array::new();
#[btf_map]
static ALLOW: LpmTrie<AllowKey, u32, 4096> = LpmTrie::new();
#[btf_map]
static COUNTER: PerCpuArray<u64, { SERVICES as usize * COUNTERS }> = PerCpuArray::new();
/// New flows of each backend.
#[btf_map]
static BACKEND_FLOWS: PerCpuArray<u64, { BACKENDS as usize }> = PerCpuArray::new();
/// Sockets of this host that the connect hook has sent to each backend and that are not closed. A socket may be closed on
/// another CPU than it was opened on: only the sum over all CPUs means something, modulo 2^64.
#[btf_map]
static BACKEND_SOCKETS: PerCpuArray<u64, { BACKENDS as usize }> = PerCpuArray::new();
/// The number of these that were closed without an event for a program. Only the daemon writes here.
#[btf_map]
static SOCKETS_MISSED: Array<u64, { BACKENDS as usize }, MAPPED> = Array::new();
/// The same sockets, by cookie. Memory is allocated for existing entries only.
#[btf_map]
static FOLLOWED_SOCKETS: HashMap<u64, Followed, { FOLLOWED as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
/// The tick counter, for the daemon: see `read_clock`.
#[btf_map]
static CLOCK: Array<u64, 1, MAPPED> = Array::new();
/// The flight recorder: a ring for each CPU and one for the daemon. The loader sets the length. (The name is older; maps are
/// taken over by it.)
#[btf_map]
static BLACK_BOX: Array<Record, { RECORDS_MIN as usize }, MAPPED> = Array::new();

/// Places of a ring, the power of two.
#[unsafe(no_mangle)]
static BLACK_BOX_BITS: Global<u32> = Global::new(RECORDS_MIN.trailing_zeros());

/// The maps. The control map is looked up once.
#[derive(Clone, Copy)]
pub struct KernelMaps {
    control: &'static Control,
}

impl KernelMaps {
    /// The maps. Always Some, which the verifier does not know.
    #[inline(always)]
    #[must_use]
    pub fn new() -> Option<Self> {
        Some(Self { control: CONTROL.get(0)? })
    }
}

impl Maps for KernelMaps {
    #[inline(always)]
    fn barrier_var(&self, number: u32) -> u32 {
        barrier_var(number.into()) as u32
    }

    #[inline(always)]
    fn repeat<B: LoopBody>(&self, count: u32, body: &mut B) {
        // SAFETY: the helper calls the callback with `body`, which outlives the call.
        unsafe {
            bpf_loop(count, callback::<B> as *mut c_void, (&raw mut *body).cast(), 0);
        }
    }

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        Some(&self.control.config)
    }

    #[inline(always)]
    fn first_listener(&self, port: u16) -> u16 {
        // The verifier knows nothing of a number whose bytes were swapped.
        self.control.classifier.listeners[(barrier_index(port.into()) & 0xffff) as usize].load()
    }

    #[inline(always)]
    fn snat_at<F: Family>(&self, address: [u64; 2]) -> u8 {
        F::snat_at(&self.control.classifier, address)
    }

    #[inline(always)]
    fn listener(&self, id: u16) -> Option<&Listener> {
        entry(&self.control.listeners, id)
    }

    #[inline(always)]
    fn service(&self, id: u16) -> Option<&Service> {
        entry(&self.control.services, id)
    }

    #[inline(always)]
    fn backend(&self, id: u8) -> Option<&Backend> {
        self.control.backends.get(usize::from(id))
    }

    #[inline(always)]
    fn selected(&self, half: u32, entry: u32) -> u8 {
        match SELECTION.get(half * SELECTION_WORDS + entry / 8) {
            Some(word) => (*word >> (entry % 8 * 8)) as u8,
            None => 0,
        }
    }

    #[inline(always)]
    fn learned_hop(&self, index: u16) -> Option<&Cell64> {
        let word = NEXT_HOP.get_ptr(u32::from(index))?;
        // SAFETY: an aligned word of map memory, which lives as long as the program; Cell64 is transparent.
        Some(unsafe { &*word.cast::<Cell64>() })
    }

    #[inline(always)]
    fn allows(&self, service: u16, client: [u64; 2]) -> bool {
        let [high, low] = client;
        barrier_var(map_allows(service.into(), high, low)) != 0
    }

    #[inline(always)]
    fn source_budgets(&self) -> Option<&SourceBudgets> {
        SOURCES.get(0)
    }

    #[inline(always)]
    fn jiffies(&self) -> u64 {
        jiffies()
    }

    #[inline(always)]
    fn count_place(&self, service: u16, place: u16) {
        count(service, place);
    }

    #[inline(always)]
    fn count_flow(&self, backend: u8) {
        if let Some(count) = BACKEND_FLOWS.get_ptr_mut(u32::from(backend)) {
            // SAFETY: as in `count`.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn note(&self, note: Note) {
        let [high, low] = note.address;
        barrier_var(map_note(high, low, note.what, note.other.into()));
    }
}

impl FlowTables for KernelMaps {
    #[inline(always)]
    fn set4(&self, index: u32) -> Option<&Set4> {
        FLOW4.get(index)
    }

    #[inline(always)]
    fn set6(&self, index: u32) -> Option<&Set6> {
        FLOW6.get(index)
    }

    #[inline(always)]
    fn numbers4(&self, set: u32, way: u32) -> Option<&Numbers> {
        let row = NUMBERS4.get(set)?;
        Some(&row.ways[barrier_index(way) as usize % WAYS])
    }

    #[inline(always)]
    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16> {
        let hops = RETURN_HOP6.get(set)?;
        Some(&hops.ways[barrier_index(way) as usize % WAYS])
    }

    #[inline(always)]
    fn blocked6(&self, set: u32) -> u8 {
        let set = set % SETS_PER_ADDRESS;
        match BLOCKED.get(set / 16) {
            Some(word) => (*word >> (set % 16 * WAYS as u32)) as u8 & 0x0f,
            None => 0x0f,
        }
    }

    #[inline(always)]
    fn overflow6(&self, set: u32) -> Option<&Cell8> {
        let marks = OVERFLOW6.get(set / 8)?;
        Some(&marks.sets[barrier_index(set) as usize % 8])
    }
}

/// Counts one, for the counter at `place`: see [`Counter::index`].
#[inline(always)]
pub fn count(service: u16, place: u16) {
    let index = u32::from(service) * COUNTERS as u32 + u32::from(place);
    if let Some(count) = COUNTER.get_ptr_mut(index) {
        // SAFETY: this CPU's own copy; programs on one CPU do not interrupt each other.
        unsafe { *count += 1 };
    }
}

/// The tick counter.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: takes nothing; inlined by the kernel's JIT.
    unsafe { bpf_jiffies64() }
}

// Counts of the connect hook. Its programs run in system calls, and may be interrupted on their CPU by their like and by the
// XDP program: so they add by one instruction.

/// Counts an event of a service's connection.
#[inline(always)]
pub fn count_connect(service: u16, event: Event) {
    let index = u32::from(service) * COUNTERS as u32 + Counter::Event(event).index() as u32;
    if let Some(count) = COUNTER.get_ptr_mut(index) {
        increment(count);
    }
}

/// Counts a connection to a backend, which is open from now on.
#[inline(always)]
pub fn count_opened(backend: u8) {
    if let Some(count) = BACKEND_FLOWS.get_ptr_mut(u32::from(backend)) {
        increment(count);
    }
    if let Some(count) = BACKEND_SOCKETS.get_ptr_mut(u32::from(backend)) {
        increment(count);
    }
}

/// Counts the end of a connection to a backend.
#[inline(always)]
pub fn count_closed(backend: u8) {
    if let Some(count) = BACKEND_SOCKETS.get_ptr_mut(u32::from(backend)) {
        add(count, u64::MAX);
    }
}

/// Enters a socket by its cookie. `false`: there is no room.
#[inline(always)]
pub fn name_socket(cookie: u64, socket: &Followed) -> bool {
    FOLLOWED_SOCKETS.insert(cookie, socket, 0).is_ok()
}

/// Removes the socket with this cookie. `false`: it was removed before.
#[inline(always)]
pub fn forget_socket(cookie: u64) -> bool {
    FOLLOWED_SOCKETS.remove(cookie).is_ok()
}

#[inline(always)]
fn increment(count: *mut u64) {
    add(count, 1);
}

/// Adds modulo 2^64.
#[inline(always)]
fn add(count: *mut u64, number: u64) {
    // SAFETY: one atomic instruction on an aligned word of map memory.
    unsafe {
        core::arch::asm!("lock *(u64 *)({count} + 0) += {number}", count = in(reg) count, number = in(reg) number);
    }
}

/// An entry by id. LLVM must not know where the id comes from, or it compares one copy and uses another, of which the
/// verifier knows nothing.
#[inline(always)]
fn entry<T, const COUNT: usize>(entries: &[T; COUNT], id: u16) -> Option<&T> {
    entries.get(barrier_var(id.into()) as usize)
}

/// What `bpf_loop` calls.
extern "C" fn callback<B: LoopBody>(index: u64, body: *mut B) -> i64 {
    // SAFETY: the body that `repeat` was called with; nothing else uses it meanwhile.
    i64::from(unsafe { &mut *body }.run(index as u32))
}

// Two accessors are functions of their own: what they put on the stack is then not on the stack of their callers.

/// Is the client (IPv4 mapped) in one of the service's prefixes? 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_allows(service: u64, high: u64, low: u64) -> u64 {
    let bits = 8 * size_of::<AllowKey>() as u32;
    ALLOW.get(&Key::new(bits, allow_key(service as u16, [high, low]))).is_some().into()
}

/// Writes a [`Note`], in its parts, into this CPU's ring of the flight recorder.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_note(high: u64, low: u64, what: u64, other: u64) -> u64 {
    let note = Note { address: [high, low], what, other: other as u8 };
    let bits = BLACK_BOX_BITS.load() & 31;
    // SAFETY: takes nothing; inlined by the kernel.
    let ring = unsafe { bpf_get_smp_processor_id() } << bits;
    flight_recorder::append(|place| BLACK_BOX.get(ring + place), bits, &note, jiffies);
    0
}

/// Leaves the tick counter where the daemon can read it.
#[inline(always)]
pub fn store_clock() {
    if let Some(clock) = CLOCK.get_ptr_mut(0) {
        // SAFETY: an aligned word of map memory; the daemon is the only one that runs this.
        unsafe { clock.write_volatile(bpf_jiffies64()) };
    }
}
