//! sheave's control plane: checks the apiservers and keeps the data path's maps true.

pub mod config;
pub mod doctor;
pub mod network;
mod state;
pub mod vip;
