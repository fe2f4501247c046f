//! Whether the kernel can run the data path, and lets us.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::{Finding, failure, note, ok, warning};
use crate::dataplane::{DataplaneError, OBJECT, Probed, probe};

/// Since then BPF memory counts toward the control group, not toward this limit.
const MEMLOCK_UNUSED: (u32, u32) = (5, 11);

pub(super) fn examine() -> Vec<Finding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut findings = vec![programs(release.trim(), probe(OBJECT, None)), privileges(&status)];
    findings.extend(fs::read_to_string("/sys/kernel/security/lockdown").ok().and_then(|it| lockdown(&it)));
    findings.push(btf(fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false)));
    findings.extend(fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").ok().map(|it| jit(it.trim())));
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _)| soft);
    findings.push(memlock(release.trim(), limit));
    findings
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What came of loading the programs. A version says little: distributions take features back into older kernels.
fn programs(release: &str, probed: Result<Vec<Probed>, DataplaneError>) -> Finding {
    let error = match probed {
        Ok(programs) => {
            return ok("kernel", format!("Linux {release} takes all {} programs", programs.len()));
        }
        Err(DataplaneError::Empty) => {
            return warning("kernel", format!("Linux {release}; {}", DataplaneError::Empty));
        }
        Err(error) => error,
    };
    let what = match error.refused_program() {
        Some((program, reason)) => format!("Linux {release} refuses program {program}: {reason}"),
        None => format!("Linux {release} does not take the programs: {error}"),
    };
    failure("kernel", what).fix("run sheave doctor as root; if this stays, install Linux 6.1 or later")
}

fn privileges(status: &str) -> Finding {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    // Numbers from linux/capability.h. CAP_SYS_ADMIN includes the two younger ones.
    let has = |bit: u32| set & (1 << bit) != 0;
    let needed = [
        ("CAP_NET_ADMIN", has(12)),
        ("CAP_NET_RAW", has(13)),
        ("CAP_PERFMON", has(38) || has(21)),
        ("CAP_BPF", has(39) || has(21)),
    ];
    let missing: Vec<_> = needed.iter().filter(|(_, held)| !held).map(|(name, _)| *name).collect();
    match missing.as_slice() {
        [] => ok("privileges", "may load BPF programs and attach them"),
        missing => failure("privileges", format!("lacks {}", missing.join(", ")))
            .fix("run sheave as root, or give its unit AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_NET_RAW CAP_PERFMON"),
    }
}

fn lockdown(modes: &str) -> Option<Finding> {
    modes.contains("[confidentiality]").then(|| {
        note("lockdown", "the kernel is locked down (confidentiality): BPF programs may not trace it, forwarding is allowed")
    })
}

fn btf(present: bool) -> Finding {
    if present {
        ok("BTF", "the kernel describes its types (/sys/kernel/btf/vmlinux)")
    } else {
        warning("BTF", "the kernel does not describe its types: tools cannot show sheave's maps with names")
            .fix("use a kernel with CONFIG_DEBUG_INFO_BTF=y (every distribution's own since 2021)")
    }
}

fn jit(value: &str) -> Finding {
    if value == "0" {
        warning("BPF JIT", "programs are interpreted, several times slower")
            .fix("sysctl -w net.core.bpf_jit_enable=1")
    } else {
        ok("BPF JIT", "on")
    }
}

fn memlock(release: &str, limit: u64) -> Finding {
    let counted = parse_version(release).is_some_and(|version| version < MEMLOCK_UNUSED);
    if counted && limit != RLIM_INFINITY {
        warning("locked memory", format!("limited to {} KiB, the flow table needs more", limit / 1024))
            .fix("LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited`")
    } else {
        ok("locked memory", "not limited for BPF")
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn a_kernel_is_judged_by_what_it_takes_and_not_by_its_number() {
        let program = |name| Probed { name, verified_instructions: None };
        let finding = programs("5.14.0-427.el9", Ok(vec![program("read_clock"), program("sheave")]));
        assert_eq!(
            (finding.level, finding.what.as_str()),
            (Level::Ok, "Linux 5.14.0-427.el9 takes all 2 programs")
        );

        let refusal = DataplaneError::Verifier {
            name: "sheave",
            reason: std::io::Error::from_raw_os_error(libc::EINVAL),
            last_words: "  unknown func bpf_loop#181\n  processed 90 insns".to_owned(),
        };
        let finding = programs("6.18.0", Err(refusal));
        assert_eq!(finding.level, Level::Failure);
        assert_eq!(finding.what, "Linux 6.18.0 refuses program sheave: unknown func bpf_loop#181");

        // A build for lints has no programs in it: nothing is known about the kernel.
        assert_eq!(programs("6.18.0", Err(DataplaneError::Empty)).level, Level::Warning);
    }

    #[test]
    fn locked_memory_matters_to_old_kernels_alone() {
        assert_eq!(memlock("5.4.0", 65536).level, Level::Warning);
        assert_eq!(memlock("6.1.0", 65536).level, Level::Ok);
        assert_eq!(memlock("unknown", 65536).level, Level::Ok);
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(privileges("CapEff:\t000001ffffffffff\n").level, Level::Ok);
        assert_eq!(
            privileges("CapEff:\t0000000000203000\n").level,
            Level::Ok,
            "an older unit with CAP_SYS_ADMIN"
        );
        let finding = privileges("CapEff:\t0000000000003000\n");
        assert_eq!((finding.level, finding.what.as_str()), (Level::Failure, "lacks CAP_PERFMON, CAP_BPF"));
    }
}
