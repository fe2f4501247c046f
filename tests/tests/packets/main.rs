//! One packet in, one packet out: the program that the daemon loads, asked by `BPF_PROG_TEST_RUN` what it makes of a
//! packet. Nothing is attached and nothing leaves the host. Each test has a program and maps of its own: those
//! that a test before is done with, after they were emptied, as the verifier takes longer for one than most tests for the rest.
//!
//! That a packet has one outcome, that its verdict is the outcome's, and that what passes is unchanged to the bit,
//! is checked for every packet of every test here: see `World::run`.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

mod budget;
mod emptied;
mod flight_recorder;
mod hostile;
mod icmp;
mod killed;
mod outcomes;
mod refusal;
mod routes;
mod selection;
mod source_budget;
mod stack;
mod states;
mod table;
mod tags;
mod translation;
mod witness;
