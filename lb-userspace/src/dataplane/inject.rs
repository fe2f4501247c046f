//! A frame through the program of a daemon, as if it had come in by an interface.

use std::path::Path;

use aya::{
    TestRunAttrs,
    programs::{ProgramError, TestRun as _, TestRunOptions, Xdp},
};
use aya_obj::programs::XdpAttachType;

use super::{DataplaneError, pins};

/// What the program is called in errors.
const NAME: &str = "sheave";

/// Runs the program that is pinned below `pin_dir` once on this Ethernet frame, which comes in by the interface with index `interface`
/// of this network namespace. What the program then sends leaves by its interface, where the driver can send frames that are handed
/// to it (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18: the kernel's `Documentation/bpf/bpf_prog_run.rst`).
///
/// # Errors
/// There is no such program, or the kernel refuses.
pub fn inject(pin_dir: &Path, interface: u32, frame: &[u8]) -> Result<(), DataplaneError> {
    let failed = |source: ProgramError| DataplaneError::Program { name: NAME, source: Box::new(source) };
    let program = Xdp::from_pin(pins::program_path(pin_dir), XdpAttachType::Interface).map_err(failed)?;
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, frame.len() as u32, 0, interface, 0, 0].map(u32::to_ne_bytes).concat();
    let options = TestRunOptions {
        data_in: Some(frame),
        ctx_in: Some(&context),
        attrs: TestRunAttrs::new().xdp_live_frames(1),
        ..TestRunOptions::new()
    };
    program.test_run(options).map(drop).map_err(failed)
}
