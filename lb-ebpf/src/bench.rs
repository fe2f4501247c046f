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
        bench::{FLOWS, PACKET, Place, Plan, call, client, direction},
        checksum::Delta,
        flow::{Family, V4, V6},
        frame::{Frame as _, Plain},
        headers::{Be16, Be32, Be64, Ethernet, Ipv4, Ipv6, Tcp},
        maps::Maps as _,
        meta::Meta,
        process,
    };
    use lb_ebpf::{frame::XdpFrame, maps::KernelMaps};

    #[btf_map]
    static PLAN: Array<Plan, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
    #[btf_map]
    static PLACE: Array<Place, { FLOWS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

    /// The product, as `main.rs` has it.
    #[xdp(frags)]
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
    fn bench(context: XdpContext) -> u32 {
        let Some(plan) = PLAN.get_ptr_mut(0) else {
            return XDP_PASS;
        };
        // SAFETY: one map entry, and test runs are not concurrent.
        let plan = unsafe { &mut *plan };
        let flow = plan.next & plan.flow_mask;
        plan.next = flow.wrapping_add(1);
        if write(&context, plan, plan.first + flow).is_none() {
            return XDP_PASS;
        }
        if plan.call == call::NOTHING {
            return XDP_TX;
        }
        let action = lb_ebpf::xdp::handle(&context);
        if plan.call == call::PROGRAM_AND_FREE {
            free(&context, plan.ipv6 != 0);
        }
        action
    }

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Start([u8; PACKET]);
    // SAFETY: bytes.
    unsafe impl Plain for Start {}

    #[inline(always)]
    fn write(context: &XdpContext, plan: &Plan, flow: u32) -> Option<()> {
        let frame = &mut XdpFrame::new(context);
        *frame.at::<Start>(0)? = Start(plan.packet);
        let (source, destination, ports) = match plan.direction {
            direction::FORWARD => {
                let (address, port) = client(flow);
                (Some(Be32::new(address)), None, (Some(Be16::new(port)), None))
            }
            direction::REPLY => {
                let place = PLACE.get(flow)?;
                (
                    Some(Be32::from_word(place.backend)),
                    Some(Be32::from_word(place.snat)),
                    (None, Some(Be16::from_word(place.port as u16))),
                )
            }
            _ => (None, None, (None, None)),
        };
        let network = size_of::<Ethernet>();
        if plan.ipv6 == 0 {
            let header = frame.at::<Ipv4>(network)?;
            let mut delta = Delta::NONE;
            if let Some(source) = source {
                delta = delta.remove(header.source.word()).add(source.word());
                header.source = source;
            }
            if let Some(destination) = destination {
                delta = delta.remove(header.destination.word()).add(destination.word());
                header.destination = destination;
            }
            header.checksum = Be16::from_word(delta.apply(header.checksum.word()));
            set_ports(frame.at::<Tcp>(network + size_of::<Ipv4>())?, ports);
        } else {
            let header = frame.at::<Ipv6>(network)?;
            if let Some(source) = source {
                header.source[1] = last_four(header.source[1], source);
            }
            if let Some(destination) = destination {
                header.destination[1] = last_four(header.destination[1], destination);
            }
            set_ports(frame.at::<Tcp>(network + size_of::<Ipv6>())?, ports);
        }
        Some(())
    }

    #[inline(always)]
    fn last_four(half: Be64, last: Be32) -> Be64 {
        Be64::from_word(half.word() & 0xffff_ffff | u64::from(last.word()) << 32)
    }

    #[inline(always)]
    fn set_ports(tcp: &mut Tcp, (source, destination): (Option<Be16>, Option<Be16>)) {
        if let Some(source) = source {
            tcp.source = source;
        }
        if let Some(destination) = destination {
            tcp.destination = destination;
        }
    }

    /// Frees the slot that the packet's new source names.
    #[inline(always)]
    fn free(context: &XdpContext, ipv6: bool) -> Option<()> {
        let maps = KernelMaps;
        let frame = &mut XdpFrame::new(context);
        let config = maps.config()?;
        let network = size_of::<Ethernet>();
        if ipv6 {
            let source = frame.at::<Ipv6>(network)?.source.map(Be64::word);
            let port = frame.at::<Tcp>(network + size_of::<Ipv6>())?.source.word();
            let slot = process::slot::<V6, _>(&maps, config, source, port)?;
            V6::meta(maps.set6(slot.set)?, slot.way).store(Meta::FREE.0);
        } else {
            let source = [u64::from(frame.at::<Ipv4>(network)?.source.word()), 0];
            let port = frame.at::<Tcp>(network + size_of::<Ipv4>())?.source.word();
            let slot = process::slot::<V4, _>(&maps, config, source, port)?;
            V4::meta(maps.set4(slot.set)?, slot.way).store(Meta::FREE.0);
        }
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
