//! How deep the stack of the programs is, as the strictest verifier counts it.

use std::collections::BTreeMap;

use lb_userspace::dataplane::{BENCH_OBJECT, OBJECT};
use object::{
    File, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SymbolKind,
};

/// What all functions of a chain of calls may take together (`MAX_BPF_STACK`).
const LIMIT: u32 = 512;
/// Linux 6.1 rounds each function's part up to this (`check_max_stack_depth`), newer ones to 16 where they compile it.
const ROUNDED: u32 = 32;
/// The register of the frame pointer.
const FRAME: u8 = 10;

/// A section and an offset there.
type Place = (SectionIndex, u64);

/// A function of an object.
struct Function {
    name: String,
    depth: u32,
    calls: Vec<Place>,
}

/// One instruction (`Documentation/bpf/standardization/instruction-set.rst`).
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn read(bytes: &[u8]) -> Self {
        let (code, registers) = (bytes[0], bytes[1]);
        Self {
            code,
            destination: registers & 0x0f,
            source: registers >> 4,
            offset: i16::from_le_bytes(bytes[2..4].try_into().unwrap()),
            immediate: i32::from_le_bytes(bytes[4..8].try_into().unwrap()),
        }
    }

    /// Bytes below the frame pointer that it reads or writes.
    fn reaches(&self) -> u32 {
        let base = match self.code & 0x07 {
            1 => self.source,
            2 | 3 => self.destination,
            _ => return 0,
        };
        if base == FRAME { (-i32::from(self.offset)).max(0) as u32 } else { 0 }
    }
}

/// All functions, by where they begin.
fn functions(object: &File<'_>) -> BTreeMap<(usize, u64), Function> {
    let mut functions = BTreeMap::new();
    for symbol in object.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let section = symbol.section_index().unwrap();
        let code = object.section_by_index(section).unwrap();
        let range = symbol.address() as usize..(symbol.address() + symbol.size()) as usize;
        let targets: BTreeMap<u64, Place> = code
            .relocations()
            .filter(|(at, _)| range.contains(&(*at as usize)))
            .filter_map(|(at, relocation)| {
                let word = &code.data().unwrap()[at as usize + 4..][..4];
                let addend = u64::from(u32::from_le_bytes(word.try_into().unwrap()));
                target(object, relocation.target(), addend).map(|place| (at, place))
            })
            .collect();
        let name = symbol.name().unwrap().to_owned();
        let function = read(name, &code.data().unwrap()[range.clone()], symbol.address(), section, &targets);
        functions.insert((section.0, symbol.address()), function);
    }
    functions
}

/// Where a relocation points to, if that is code. What a section's own symbol is used with is an offset there: in bytes, or in
/// a call in instructions from the next one on.
fn target(object: &File<'_>, target: RelocationTarget, addend: u64) -> Option<Place> {
    let RelocationTarget::Symbol(index) = target else { return None };
    let symbol = object.symbol_by_index(index).ok()?;
    let section = symbol.section_index()?;
    let name = object.section_by_index(section).ok()?.name().ok()?.to_owned();
    match symbol.kind() {
        SymbolKind::Text => Some((section, symbol.address())),
        SymbolKind::Section if name == ".text" => Some((section, addend)),
        _ => None,
    }
}

fn read(
    name: String,
    code: &[u8],
    start: u64,
    section: SectionIndex,
    targets: &BTreeMap<u64, Place>,
) -> Function {
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const LOCAL: u8 = 1;
    let (mut depth, mut calls) = (0, Vec::new());
    // The register that was made a copy of the frame pointer by the instruction before.
    let mut copy = None;
    for (number, bytes) in code.chunks_exact(8).enumerate() {
        let at = start + 8 * number as u64;
        let instruction = Instruction::read(bytes);
        depth = depth.max(instruction.reaches());
        if instruction.code == ADD && copy == Some(instruction.destination) {
            depth = depth.max((-instruction.immediate).max(0) as u32);
        }
        copy = (instruction.code == MOVE && instruction.source == FRAME).then_some(instruction.destination);
        if let Some(place) = targets.get(&at) {
            calls.push(*place);
        } else if instruction.code == CALL && instruction.source == LOCAL {
            calls.push((section, (at as i64 + 8 * (i64::from(instruction.immediate) + 1)) as u64));
        }
    }
    Function { name, depth, calls }
}

/// The deepest chain of calls from a function on: its depth, and the names.
fn deepest(functions: &BTreeMap<(usize, u64), Function>, at: (usize, u64)) -> (u32, Vec<String>) {
    let function = &functions[&at];
    let below = function.calls.iter().map(|(section, offset)| deepest(functions, (section.0, *offset)));
    let (depth, names) = below.max_by_key(|(depth, _)| *depth).unwrap_or_default();
    let own = function.depth.max(1).next_multiple_of(ROUNDED);
    let name = format!("{} ({})", function.name, function.depth);
    (own + depth, [vec![name], names].concat())
}

#[test]
fn no_chain_of_calls_is_too_deep_for_the_oldest_kernel() {
    for data in [OBJECT, BENCH_OBJECT] {
        let object = File::parse(data).unwrap();
        let functions = functions(&object);
        let (depth, names) = functions.keys().map(|at| deepest(&functions, *at)).max().unwrap();
        println!("{depth} of {LIMIT} bytes: {}", names.join(", "));
        assert!(names.len() > 2 && depth > LIMIT / 2, "the chain was not followed");
        assert!(depth <= LIMIT, "Linux 6.1 refuses this: {names:?}");
    }
}
