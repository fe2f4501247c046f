//! sheave's control plane: checks the apiservers and keeps the data path's maps true.

pub mod admin;
pub mod cli;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod dataplane;
pub mod discovery;
pub mod doctor;
pub mod health;
pub mod hook;
pub mod init;
pub mod kubeconfig;
mod lock;
pub mod names;
pub mod network;
mod privileges;
pub mod resets;
pub mod sockets;
pub mod sources;
mod state;
mod systemd;
pub mod vip;
pub mod why;
