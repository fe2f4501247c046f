//! The capabilities that a running daemon keeps. It is root's process that reads answers from the network: what it does
//! not need, nobody can make use of.
//!
//! | kept | for |
//! |---|---|
//! | CAP_BPF | reading counters and changing the allow list; kernels before 5.19 refuse `bpf(2)` without |
//! | CAP_NET_ADMIN | asking for neighbours, adding and removing VIPs, attaching to an interface, switching offloads |
//! | CAP_NET_RAW | announcing a VIP, sending RSTs |
//! | CAP_DAC_READ_SEARCH | reading certificates and tokens again that belong to other users |
//!
//! Loading needs CAP_PERFMON as well, mounting the BPF file system CAP_SYS_ADMIN: both are over by then.
//!
//! The thread that ends sockets (`crate::sockets`) keeps CAP_BPF, to read which they are, and CAP_NET_ADMIN, to end them. Where
//! a service has `pods = true`, it keeps CAP_SYS_ADMIN as well, to enter network namespaces, and CAP_SYS_PTRACE, to find those
//! of other users' processes. The unit does not give these two: `packaging/sheave.service.d/pods.conf` does.

use std::collections::HashSet;

use caps::{CapSet, Capability, errors::CapsError};

const KEPT: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
];

const FOR_PODS: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE];

/// Gives up the others, for this thread and those that it starts from now on. Cannot be undone.
pub(crate) fn drop_unneeded() -> Result<(), CapsError> {
    keep(&KEPT)
}

/// Whether this thread may enter the network namespaces of pods, and find them.
pub(crate) fn reach_pods() -> bool {
    FOR_PODS.iter().all(|capability| caps::has_cap(None, CapSet::Effective, *capability).unwrap_or(false))
}

/// As [`drop_unneeded`], for the thread that ends sockets. `pods`: also in the network namespaces of others.
pub(crate) fn keep_for_sockets(pods: bool) -> Result<(), CapsError> {
    let here = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];
    keep(&if pods { [here, FOR_PODS].concat() } else { here.to_vec() })
}

fn keep(wanted: &[Capability]) -> Result<(), CapsError> {
    let had = caps::read(None, CapSet::Permitted)?;
    let kept: HashSet<_> = wanted.iter().copied().filter(|capability| had.contains(capability)).collect();
    // First what could be had back by executing a program; that needs CAP_SETPCAP itself.
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)
}
