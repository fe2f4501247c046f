//! The program inside a wrapper that gives it a fresh packet on every repetition, and programs for the laboratory.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        bindings::{
            BPF_F_MMAPABLE,
            xdp_action::{XDP_PASS, XDP_TX},
        },
        btf_maps::Array,
        macros::{btf_map, xdp},
        programs::XdpContext,
    };
    use lb_common::{
        bench::{FLOWS, IN_FLIGHT, PACKET, Place, Plan, STRIDE, call, client, direction},
        checksum::Delta,
        destination,
        flow::{Family, V4, V6},
        frame::Frame as _,
        headers::{Be16, Be32, Be64, Ethernet, Ipv4, Ipv6, Tcp},
        maps::Maps as _,
        meta::Meta,
        tables::FlowTables as _,
    };
    use lb_ebpf::{frame::XdpFrame, maps::KernelMaps};

    #[btf_map]
    static PLAN: Array<Plan, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
    #[btf_map]
    static PLACE: Array<u64, { FLOWS as usize / 2 }, { BPF_F_MMAPABLE as usize }> = Array::new();

    /// The product, as `main.rs` has it.
    #[xdp(frags)]
    #[inline(always)]
    fn sheave(context: XdpContext) -> u32 {
        lb_ebpf::xdp::handle(&context)
    }

    /// As `main.rs` has it.
    #[xdp]
    fn read_clock(_: XdpContext) -> u32 {
        lb_ebpf::maps::store_clock();
        XDP_PASS
    }

    /// For a host of the laboratory: an XDP program on the far end lets a veth take frames that were redirected to it.
    #[xdp(frags)]
    fn pass(_: XdpContext) -> u32 {
        XDP_PASS
    }

    /// Writes the plan's next packet and calls the program on it.
    #[xdp(frags)]
    #[inline(always)]
    fn bench(context: XdpContext) -> u32 {
        let Some(plan) = PLAN.get_ptr_mut(0) else {
            return XDP_PASS;
        };
        // SAFETY: one map entry, and test runs are not concurrent.
        let plan = unsafe { &mut *plan };
        let flow = plan.next & plan.flow_mask;
        plan.next = flow.wrapping_add(1);
        if flow == plan.flow_mask {
            plan.round = plan.round.wrapping_add(1);
        }
        if write(&context, plan, plan.first + flow).is_none() {
            return XDP_PASS;
        }
        let ipv6 = plan.ipv6 != 0;
        match plan.call {
            call::NOTHING => XDP_TX,
            call::FREE => {
                free(&context, ipv6, false);
                XDP_TX
            }
            call::PROGRAM_AND_FREE => {
                let action = lb_ebpf::xdp::handle(&context);
                free(&context, ipv6, true);
                action
            }
            _ => lb_ebpf::xdp::handle(&context),
        }
    }

    #[inline(always)]
    fn write(context: &XdpContext, plan: &Plan, flow: u32) -> Option<()> {
        let frame = &mut XdpFrame::new(context.ctx);
        let start = frame.at::<[[u8; 8]; PACKET / 8]>(0)?;
        for (place, word) in start.iter_mut().zip(&plan.packet) {
            // SAFETY: a live reference. Volatile, or LLVM calls memcpy, a loop over bytes.
            unsafe { (&raw mut *place).write_volatile(word.to_ne_bytes()) };
        }
        match plan.direction {
            direction::FORWARD => {
                let (address, port) = client(flow);
                let tcp = set_source(frame, plan.ipv6 != 0, Be32::new(address))?;
                let tcp = frame.at::<Tcp>(tcp)?;
                tcp.source = Be16::new(port);
                tcp.acknowledgement = Be32::new(plan.round);
            }
            direction::REPLY => {
                let place = Place::of(*PLACE.get(flow / 2)?, flow);
                set_source(frame, plan.ipv6 != 0, Be32::new(plan.backend + place.backend()))?;
                let tcp = set_destination(frame, plan.ipv6 != 0, Be32::new(plan.snat + place.snat()))?;
                let tcp = frame.at::<Tcp>(tcp)?;
                tcp.destination = Be16::new(place.port());
                tcp.sequence = Be32::new(plan.round.wrapping_mul(STRIDE).wrapping_add(IN_FLIGHT));
            }
            _ => {}
        }
        Some(())
    }

    const NETWORK: usize = size_of::<Ethernet>();

    /// Sets the last four bytes of the source address. Returns where the TCP header is.
    #[inline(always)]
    fn set_source(frame: &mut XdpFrame, ipv6: bool, last: Be32) -> Option<usize> {
        if ipv6 {
            let header = frame.at::<Ipv6>(NETWORK)?;
            header.source[1] = last_four(header.source[1], last);
            return Some(NETWORK + size_of::<Ipv6>());
        }
        let header = frame.at::<Ipv4>(NETWORK)?;
        let delta = Delta::NONE.remove(header.source.word()).add(last.word());
        header.source = last;
        header.checksum = Be16::from_word(delta.apply(header.checksum.word()));
        Some(NETWORK + size_of::<Ipv4>())
    }

    /// Sets the last four bytes of the destination address. Returns where the TCP header is.
    #[inline(always)]
    fn set_destination(frame: &mut XdpFrame, ipv6: bool, last: Be32) -> Option<usize> {
        if ipv6 {
            let header = frame.at::<Ipv6>(NETWORK)?;
            header.destination[1] = last_four(header.destination[1], last);
            return Some(NETWORK + size_of::<Ipv6>());
        }
        let header = frame.at::<Ipv4>(NETWORK)?;
        let delta = Delta::NONE.remove(header.destination.word()).add(last.word());
        header.destination = last;
        header.checksum = Be16::from_word(delta.apply(header.checksum.word()));
        Some(NETWORK + size_of::<Ipv4>())
    }

    #[inline(always)]
    fn last_four(half: Be64, last: Be32) -> Be64 {
        Be64::from_word(half.word() & 0xffff_ffff | u64::from(last.word()) << 32)
    }

    /// Frees the slot that the packet's new source names. Or, where the program chose none, does the same work without
    /// effect, with a slot of the packet's destination.
    #[inline(always)]
    fn free(context: &XdpContext, ipv6: bool, chosen: bool) -> Option<()> {
        let maps = KernelMaps::new()?;
        let frame = &mut XdpFrame::new(context.ctx);
        let config = maps.config()?;
        let word = if ipv6 {
            let header = frame.at::<Ipv6>(NETWORK)?;
            let address = if chosen { header.source } else { header.destination };
            let port = frame.at::<Tcp>(NETWORK + size_of::<Ipv6>())?.source.word();
            let slot = destination::slot::<V6, _>(&maps, config, address.map(Be64::word), port)?;
            V6::meta(maps.set6(slot.set)?, slot.way)
        } else {
            let header = frame.at::<Ipv4>(NETWORK)?;
            let address = if chosen { header.source } else { header.destination };
            let port = frame.at::<Tcp>(NETWORK + size_of::<Ipv4>())?.source.word();
            let slot = destination::slot::<V4, _>(&maps, config, [u64::from(address.word()), 0], port)?;
            V4::meta(maps.set4(slot.set)?, slot.way)
        };
        word.store(if chosen { Meta::FREE.0 } else { word.load() });
        Some(())
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 4] = *b"GPL\0";

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}

/// Nothing: the host builds this crate only to lint it.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
