//! A load balancer: three apiservers fail behind a VIP.

use std::{net::SocketAddr, sync::atomic::AtomicBool, time::Instant};

use anyhow::{Result, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    load::{Asker, Client},
    stub::{Health, PORT, Stub},
};

use crate::{
    LANES, PATIENCE, PAUSE,
    demo::Demo,
    losses::{Losses, Register},
    play::shown,
};

impl<'flag> Demo<'flag> {
    pub(crate) fn on_the_edge(interrupted: &'flag AtomicBool) -> Result<Self> {
        println!("Building a laboratory: a client, a load balancer, three apiservers behind TLS ...");
        let cluster = Cluster::start(Shape::OneArm, 3)?;
        let started = Instant::now();
        let daemon = cluster.balance()?;
        println!(
            "sheave runs on the load balancer and found three ready apiservers in {:.1?}.",
            started.elapsed()
        );
        let client = Client::new(&cluster.ca_file(), SocketAddr::new(cluster.vip4, PORT), PATIENCE)?;
        let asker = Asker::start(&cluster.client, &client, LANES, PAUSE);
        println!("A client keeps asking https://{}:{PORT}, {LANES} new connections at a time.", cluster.vip4);
        let by_hand = shown(&cluster.curl(cluster.vip4, "/name"));
        Ok(Self {
            daemon,
            asker,
            watch: None,
            _visit: None,
            cluster,
            interrupted,
            faults: Vec::new(),
            losses: Losses::new(Register::FlightRecorder),
            by_hand,
        })
    }

    /// Everything that can happen to an apiserver, once.
    pub(crate) fn tell_of_the_edge(&mut self) -> Result<()> {
        self.scene("All is well")?;
        self.fault("api-1", "api-1 is killed", Stub::kill)?;
        self.verdict("api-1")?;
        self.scene("api-1 is out, nobody notices")?;

        let title = "api-2 freezes: its kernel accepts connections, nobody answers";
        self.fault("api-2", title, Stub::freeze)?;
        self.verdict("api-2")?;
        self.scene("One of three is left")?;

        println!("\n>> api-1 is started again, api-2 thaws");
        self.cluster.apiserver("api-1")?.start()?;
        self.cluster.apiserver("api-2")?.stub.thaw()?;
        self.wait_for("api-1", "ready")?;
        self.wait_for("api-2", "ready")?;
        self.scene("All three again")?;

        println!("\n>> api-3 says 500 at /readyz: it is about to stop, and still serves");
        self.cluster.apiserver("api-3")?.stub.health(Health::Status(500))?;
        self.wait_for("api-3", "draining")?;
        // Requests that were under way have ended by then.
        self.go_on_for(PATIENCE)?;
        let before = self.new_connections("api-3")?;
        self.scene("api-3 drains: no new connection, no lost request")?;
        let after = self.new_connections("api-3")?;
        ensure!(before == after, "api-3 got {} new connections while draining", after - before);

        println!("\n>> api-3 is well again");
        self.cluster.apiserver("api-3")?.stub.health(Health::Normal)?;
        self.wait_for("api-3", "ready")?;
        self.scene("All is well")?;
        self.judge()
    }
}
