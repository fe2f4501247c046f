//! The maps, behind functions. All that packets need are arrays, but the allow list: a look-up is a comparison and an
//! addition.
//!
//! The daemon maps most of them into its memory and changes words in place; which word may be changed by whom, and
//! how, is said at the layouts (`lb_common::layout`) and, for slots, in `lb_common::flow`.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    helpers::{bpf_get_smp_processor_id, bpf_jiffies64, bpf_loop},
    macros::btf_map,
};
use lb_common::{
    black_box::{self, Note, RECORDS_MIN, Record},
    cell::{Cell8, Cell16, Cell64},
    flow::{Choice, Claim, Claimer, Family, Found, Query, Slot},
    hash::FlowHash,
    layout::{
        AllowKey, BACKENDS, Backend, Config, Control, FOLLOWED, Followed, Listener, NEXT_HOPS, OverflowMarks,
        PORTS, ReturnHops, SELECTION_HALVES, SELECTION_WORDS, SERVICES, SETS_PER_ADDRESS, SNAT_ADDRESSES,
        Service, Set4, Set6, WAYS, allow_key, family,
    },
    maps::{Maps, Step},
    meta::Meta,
    outcome::{COUNTERS, Counter, Event},
};

use crate::subprograms::{self, laundered};

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
#[btf_map]
static RETURN_HOP4: Array<ReturnHops, SETS, MAPPED> = Array::new();
#[btf_map]
static RETURN_HOP6: Array<ReturnHops, SETS, MAPPED> = Array::new();
#[btf_map]
static OVERFLOW4: Array<OverflowMarks, { SETS / 8 }, MAPPED> = Array::new();
#[btf_map]
static OVERFLOW6: Array<OverflowMarks, { SETS / 8 }, MAPPED> = Array::new();
/// Ports that must not become slots, by bit; the same for every address.
#[btf_map]
static BLOCKED: Array<u64, { 65_536 / 64 }, MAPPED> = Array::new();
/// Learned ways back to clients: see `NextHop`.
#[btf_map]
static NEXT_HOP: Array<u64, { NEXT_HOPS as usize }, MAPPED> = Array::new();
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
/// Of these, those that were closed without a program having heard of it. Only the daemon writes here.
#[btf_map]
static SOCKETS_MISSED: Array<u64, { BACKENDS as usize }, MAPPED> = Array::new();
/// The same sockets, by cookie. Memory is taken for those that there are.
#[btf_map]
static FOLLOWED_SOCKETS: HashMap<u64, Followed, { FOLLOWED as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
/// The tick counter, for the daemon: see `read_clock`.
#[btf_map]
static CLOCK: Array<u64, 1, MAPPED> = Array::new();
/// A ring for each CPU and one for the daemon: the loader makes it as long as that takes.
#[btf_map]
static BLACK_BOX: Array<Record, { RECORDS_MIN as usize }, MAPPED> = Array::new();

/// Places of a ring, the power of two.
#[unsafe(no_mangle)]
static BLACK_BOX_BITS: Global<u32> = Global::new(RECORDS_MIN.trailing_zeros());

/// The maps, with what is in all programs looked up.
#[derive(Clone, Copy)]
pub struct KernelMaps {
    control: &'static Control,
}

impl KernelMaps {
    /// The maps. None never comes, but the verifier does not know.
    #[inline(always)]
    #[must_use]
    pub fn new() -> Option<Self> {
        Some(Self { control: CONTROL.get(0)? })
    }
}

impl Maps for KernelMaps {
    #[inline(always)]
    fn opaque(&self, number: u32) -> u32 {
        laundered(number.into()) as u32
    }

    #[inline(always)]
    fn repeat<S: Step>(&self, count: u32, step: &mut S) {
        // SAFETY: the helper calls the callback with `step`, which outlives the call.
        unsafe {
            bpf_loop(count, callback::<S> as *mut c_void, (&raw mut *step).cast(), 0);
        }
    }

    #[inline(always)]
    fn find_listener(&self, family: u8, address: [u64; 2], port: u16) -> u16 {
        let [high, low] = address;
        laundered(subprograms::map_listener(family.into(), high, low, port.into())) as u16
    }

    #[inline(always)]
    fn snat_index<F: Family>(&self, address: [u64; 2]) -> Option<u32> {
        let [high, low] = address;
        let index = laundered(subprograms::map_snat_index(F::NUMBER.into(), high, low));
        (index < SNAT_ADDRESSES as u64).then_some(index as u32)
    }

    #[inline(always)]
    fn arrival(&self, interface: u32, vlan: u32, mac: u64) -> Option<u16> {
        let port = laundered(subprograms::map_arrival(interface.into(), vlan.into(), mac));
        (port < PORTS as u64).then_some(port as u16)
    }

    #[inline(always)]
    fn another<F: Family>(&self, service: u16, hash: FlowHash, refused: u8) -> u8 {
        let (service, family) = (service.into(), F::NUMBER.into());
        laundered(subprograms::map_another(family, service, hash.0, refused.into())) as u8
    }

    #[inline(always)]
    fn learn(&self, hop: u64) -> u16 {
        laundered(subprograms::map_learn(hop)) as u16
    }

    #[inline(always)]
    fn is_backend(&self, family: u8, address: [u64; 2], port: u16) -> bool {
        let [high, low] = address;
        laundered(subprograms::map_is_backend(family.into(), high, low, port.into())) != 0
    }

    #[inline(always)]
    fn find_in<F: Family>(&self, query: &Query<F::Tuple>, candidates: u32, except: Slot) -> Found {
        let except = Found::new(except, Meta::FREE).word();
        let query = (&raw const *query).cast::<()>();
        Found::from_word(laundered(if F::NUMBER == family::IPV4 {
            subprograms::flow4_find(query.cast(), candidates, except)
        } else {
            subprograms::flow6_find(query.cast(), candidates, except)
        }))
    }

    #[inline(always)]
    fn claim_free<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
        let query = (&raw const *query).cast::<()>();
        Claim::from_word(laundered(if F::NUMBER == family::IPV4 {
            subprograms::flow4_claim_free(query.cast(), claimer)
        } else {
            subprograms::flow6_claim_free(query.cast(), claimer)
        }))
    }

    #[inline(always)]
    fn choose<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer) -> Choice {
        let query = (&raw const *query).cast::<()>();
        Choice::from_word(laundered(if F::NUMBER == family::IPV4 {
            subprograms::flow4_choose(query.cast(), claimer)
        } else {
            subprograms::flow6_choose(query.cast(), claimer)
        }))
    }

    #[inline(always)]
    fn take<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer, found: Found) -> Claim {
        let found = found.word();
        let query = (&raw const *query).cast::<()>();
        Claim::from_word(laundered(if F::NUMBER == family::IPV4 {
            subprograms::flow4_take(query.cast(), claimer, found)
        } else {
            subprograms::flow6_take(query.cast(), claimer, found)
        }))
    }

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        Some(&self.control.config)
    }

    #[inline(always)]
    fn first_listener(&self, port: u16) -> u16 {
        // The verifier knows nothing of a number whose bytes were swapped.
        self.control.classifier.listeners[(checked(port.into()) & 0xffff) as usize].load()
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
    fn blocked(&self, set: u32) -> u8 {
        let set = set % SETS_PER_ADDRESS;
        match BLOCKED.get(set / 16) {
            Some(word) => (*word >> (set % 16 * WAYS as u32)) as u8 & 0x0f,
            None => 0x0f,
        }
    }

    #[inline(always)]
    fn allows(&self, service: u16, client: [u64; 2]) -> bool {
        let [high, low] = client;
        laundered(subprograms::map_allows(service.into(), high, low)) != 0
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
        laundered(subprograms::map_note(high, low, note.what, note.other.into()));
    }

    #[inline(always)]
    fn set4(&self, index: u32) -> Option<&Set4> {
        FLOW4.get(index)
    }

    #[inline(always)]
    fn set6(&self, index: u32) -> Option<&Set6> {
        FLOW6.get(index)
    }

    #[inline(always)]
    fn return_hop4(&self, set: u32, way: u32) -> Option<&Cell16> {
        let hops = RETURN_HOP4.get(set)?;
        Some(&hops.ways[checked(way) as usize % WAYS])
    }

    #[inline(always)]
    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16> {
        let hops = RETURN_HOP6.get(set)?;
        Some(&hops.ways[checked(way) as usize % WAYS])
    }

    #[inline(always)]
    fn overflow4(&self, set: u32) -> Option<&Cell8> {
        let marks = OVERFLOW4.get(set / 8)?;
        Some(&marks.sets[checked(set) as usize % 8])
    }

    #[inline(always)]
    fn overflow6(&self, set: u32) -> Option<&Cell8> {
        let marks = OVERFLOW6.get(set / 8)?;
        Some(&marks.sets[checked(set) as usize % 8])
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

/// Counts what became of a service's connection.
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

/// Knows a socket by its cookie from now on. `false`: there is no room.
#[inline(always)]
pub fn name_socket(cookie: u64, socket: &Followed) -> bool {
    FOLLOWED_SOCKETS.insert(cookie, socket, 0).is_ok()
}

/// Knows the socket with this cookie no longer. `false`: somebody else has taken it out before.
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
    entries.get(laundered(id.into()) as usize)
}

/// What `bpf_loop` calls.
extern "C" fn callback<S: Step>(index: u64, step: *mut S) -> i64 {
    // SAFETY: the step that `repeat` was called with; nobody else has it meanwhile.
    i64::from(unsafe { &mut *step }.step(index as u32))
}

/// An index, known only after the map's value was found to be there: otherwise LLVM adds it to the pointer first, and
/// the verifier allows no arithmetic on a pointer that may be null.
#[inline(always)]
fn checked(index: u32) -> u32 {
    let mut index = index;
    // SAFETY: moves a register onto itself. (Without an instruction two source lines would share one, which the
    // kernel refuses.)
    unsafe { core::arch::asm!("{0} = {0}", inout(wreg) index, options(nomem, nostack)) };
    index
}

/// Is the client in one of the service's prefixes?
#[inline(always)]
pub fn allows(service: u16, client: [u64; 2]) -> bool {
    let bits = 8 * size_of::<AllowKey>() as u32;
    ALLOW.get(&Key::new(bits, allow_key(service, client))).is_some()
}

/// Writes into this CPU's ring of the black box.
#[inline(always)]
pub fn note(note: &Note) {
    let bits = BLACK_BOX_BITS.load() & 31;
    // SAFETY: takes nothing; inlined by the kernel.
    let ring = unsafe { bpf_get_smp_processor_id() } << bits;
    black_box::append(|place| BLACK_BOX.get(ring + place), bits, note, jiffies());
}

/// Leaves the tick counter where the daemon can read it.
#[inline(always)]
pub fn store_clock() {
    if let Some(clock) = CLOCK.get_ptr_mut(0) {
        // SAFETY: an aligned word of map memory; the daemon is the only one that runs this.
        unsafe { clock.write_volatile(bpf_jiffies64()) };
    }
}
