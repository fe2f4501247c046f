//! The maps, behind functions. All but the allow list are arrays: a look-up is a comparison and an addition.
//!
//! The daemon maps most of them into its memory and changes words in place; which word may be changed by whom, and
//! how, is said at the layouts (`lb_common::layout`) and, for slots, in `lb_common::flow`.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MMAPABLE, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParameters},
    btf_maps::{
        Array, LpmTrie, PerCpuArray,
        lpm_trie::Key,
    },
    helpers::{bpf_fib_lookup, bpf_jiffies64},
    macros::btf_map,
    programs::XdpContext,
};
use lb_common::{
    cell::{Cell16, Cell64},
    headers::Mac,
    layout::{
        AllowKey, BACKENDS, Backend, Config, LISTENERS, Listener, NEXT_HOPS, OverflowMarks, ReturnHops,
        SELECTION_HALVES, SELECTION_WORDS, SERVICES, SETS_PER_ADDRESS, Service, Set4, Set6, WAYS, allow_key, family,
    },
    maps::{Maps, Route},
    outcome::COUNTERS,
};

const MAPPED: usize = BPF_F_MMAPABLE as usize;
/// Sets of one SNAT address: the loader multiplies these maps by the number of addresses.
const SETS: usize = SETS_PER_ADDRESS as usize;

#[btf_map]
static CONFIG: Array<Config, 1, MAPPED> = Array::new();
/// For each port number the first listener, four to a word.
#[btf_map]
static LISTENER_PORTS: Array<u64, { 65_536 / 4 }, MAPPED> = Array::new();
#[btf_map]
static LISTENER: Array<Listener, { LISTENERS as usize }, MAPPED> = Array::new();
#[btf_map]
static SERVICE: Array<Service, { SERVICES as usize }, MAPPED> = Array::new();
#[btf_map]
static BACKEND: Array<Backend, { BACKENDS as usize }, MAPPED> = Array::new();
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
/// The tick counter, for the daemon: see `read_clock`.
#[btf_map]
static CLOCK: Array<u64, 1, MAPPED> = Array::new();

/// The maps, with the context that some helpers want.
#[derive(Clone, Copy)]
pub struct KernelMaps<'a> {
    context: &'a XdpContext,
}

impl<'a> KernelMaps<'a> {
    /// The maps, for a program called with `context`.
    #[inline(always)]
    pub fn new(context: &'a XdpContext) -> Self {
        Self { context }
    }
}

impl Maps for KernelMaps<'_> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn first_listener(&self, port: u16) -> u16 {
        match LISTENER_PORTS.get(u32::from(port) / 4) {
            Some(word) => (*word >> (u32::from(port) % 4 * 16)) as u16,
            None => 0,
        }
    }

    #[inline(always)]
    fn listener(&self, id: u16) -> Option<&Listener> {
        LISTENER.get(u32::from(id))
    }

    #[inline(always)]
    fn service(&self, id: u16) -> Option<&Service> {
        SERVICE.get(u32::from(id))
    }

    #[inline(always)]
    fn backend(&self, id: u8) -> Option<&Backend> {
        BACKEND.get(u32::from(id))
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
        let bits = 8 * size_of::<AllowKey>() as u32;
        ALLOW.get(&Key::new(bits, allow_key(service, client))).is_some()
    }

    #[inline(always)]
    fn jiffies(&self) -> u64 {
        // SAFETY: takes nothing; inlined by the kernel's JIT.
        unsafe { bpf_jiffies64() }
    }

    #[inline(always)]
    fn count_place(&self, service: u16, place: u16) {
        let index = u32::from(service) * COUNTERS as u32 + u32::from(place);
        if let Some(count) = COUNTER.get_ptr_mut(index) {
            // SAFETY: this CPU's own copy; programs on one CPU do not interrupt each other.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn count_flow(&self, backend: u8) {
        if let Some(count) = BACKEND_FLOWS.get_ptr_mut(u32::from(backend)) {
            // SAFETY: as above.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn route(&self, interface: u32, family_number: u8, destination: [u64; 2]) -> Option<Route> {
        // SAFETY: a plain structure of integers.
        let mut parameters: FibParameters = unsafe { core::mem::zeroed() };
        parameters.ifindex = interface;
        if family_number == family::IPV4 {
            parameters.family = 2; // AF_INET
            parameters.__bindgen_anon_4.ipv4_dst = destination[0] as u32;
        } else {
            parameters.family = 10; // AF_INET6
            parameters.__bindgen_anon_4.ipv6_dst = halves(destination);
        }
        // SAFETY: our own context, and a parameter block with its true size.
        let result = unsafe {
            bpf_fib_lookup(
                self.context.as_ptr(),
                &raw mut parameters,
                size_of::<FibParameters>() as i32,
                0,
            )
        };
        if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
            return None;
        }
        Some(Route {
            interface: parameters.ifindex,
            source_mac: Mac::new(parameters.smac).number(),
            mac: Mac::new(parameters.dmac).number(),
        })
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
        Some(&RETURN_HOP4.get(set)?.ways[way as usize % WAYS])
    }

    #[inline(always)]
    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16> {
        Some(&RETURN_HOP6.get(set)?.ways[way as usize % WAYS])
    }

    #[inline(always)]
    fn overflow4(&self, index: u32) -> Option<&OverflowMarks> {
        OVERFLOW4.get(index)
    }

    #[inline(always)]
    fn overflow6(&self, index: u32) -> Option<&OverflowMarks> {
        OVERFLOW6.get(index)
    }
}

/// An IPv6 address as the kernel's structure has it.
#[inline(always)]
fn halves(address: [u64; 2]) -> [u32; 4] {
    [
        address[0] as u32,
        (address[0] >> 32) as u32,
        address[1] as u32,
        (address[1] >> 32) as u32,
    ]
}

/// Leaves the tick counter where the daemon can read it.
#[inline(always)]
pub fn store_clock() {
    if let Some(clock) = CLOCK.get_ptr_mut(0) {
        // SAFETY: an aligned word of map memory; the daemon is the only one that runs this.
        unsafe { clock.write_volatile(bpf_jiffies64()) };
    }
}
