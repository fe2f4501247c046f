//! An XDP program on the switch's end of every cable.
//!
//! A veth that sends a frame by `XDP_TX` wakes its peer only if that has an XDP program of its own
//! (`veth_xdp_flush`). Without one the frame waits in the peer's ring until ordinary traffic comes along, and once the
//! ring is full nobody ever looks at it again.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use lb_userspace::dataplane::BENCH_OBJECT;

/// The program `pass`, loaded once for all labs of a process. The links go with their interfaces.
static PASS: Mutex<Option<Ebpf>> = Mutex::new(None);

/// Attaches a program that passes everything on to an interface of the current network namespace.
pub(super) fn take_transmitted_frames(interface: &str) -> Result<()> {
    let mut loaded = PASS.lock().unwrap_or_else(PoisonError::into_inner);
    let ebpf = match &mut *loaded {
        Some(ebpf) => ebpf,
        empty => empty.insert(load()?),
    };
    pass(ebpf)?.attach(interface, XdpMode::Driver).with_context(|| format!("attaching to {interface}"))?;
    Ok(())
}

fn load() -> Result<Ebpf> {
    let mut ebpf = Ebpf::load(BENCH_OBJECT).context("loading the program for switch ports")?;
    pass(&mut ebpf)?.load()?;
    Ok(ebpf)
}

fn pass(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut("pass").context("the bench object has no program `pass`")?.try_into()?)
}
