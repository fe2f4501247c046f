//! Whether this kernel takes the programs: they are loaded, as the daemon loads them, and go again.

use aya::programs::ProgramInfo;

use super::{Dataplane, DataplaneError, Origin, Settings, hook, load_object, load_program};

/// A program that the kernel took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Its name in the object.
    pub name: &'static str,
    /// Instructions that the verifier went through, every path counted. None: the kernel does not say.
    pub verified_instructions: Option<u32>,
}

/// Loads every program of the object, as it is with this `log_one_in` of the [`Settings`]. Nothing is attached, pinned or
/// left behind.
///
/// # Errors
/// The first program that the kernel refuses, with the last lines of its verifier.
pub fn probe(object: &[u8], log_one_in: Option<u32>) -> Result<Vec<Probed>, DataplaneError> {
    if object.is_empty() {
        return Err(DataplaneError::Empty);
    }
    // Without addresses the flow table is as small as it gets: its size is nothing to the verifier.
    let settings = Settings {
        snat_addresses: Vec::new(),
        snat_room: 0,
        snat_ports: 1024..=65_535,
        secret: [0; 2],
        log_one_in,
        sets_error: hook::sets_error(),
    };
    let mut ebpf = load_object(object, &settings, &Origin::default())?;
    for name in PACKET_PROGRAMS {
        load_program(&mut ebpf, name)?;
    }
    let mut dataplane = Dataplane::over_maps(ebpf)?;
    dataplane.load_hook()?;
    let names = PACKET_PROGRAMS.into_iter().chain(hook::PROGRAMS);
    names
        .map(|name| Ok(Probed { name, verified_instructions: dataplane.verified_instructions(name)? }))
        .collect()
}

/// Those that look at packets, and the clock's.
const PACKET_PROGRAMS: [&str; 2] = ["read_clock", "sheave"];

impl Dataplane {
    fn verified_instructions(&self, name: &'static str) -> Result<Option<u32>, DataplaneError> {
        let program = self.ebpf.program(name).ok_or(DataplaneError::Missing(name))?;
        let error = |source| DataplaneError::Program { name, source: Box::new(source) };
        let info: ProgramInfo = program.info().map_err(error)?;
        Ok(info.verified_instruction_count())
    }
}
