//! Images that a replica is to begin with, as a person brings them.

use replica::Seed;
use serde_json::{Value, json};

use crate::commands::Site;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::request::SeedRequest;

impl Site {
    /// Copies the images; the VM's next offer finds them.
    pub(crate) async fn seed_replica(&self, request: SeedRequest) -> Result<Value, Failure> {
        let SeedRequest { vm, disks, format } = request;
        if self.primary.get(&vm).is_some() {
            let message =
                format!("{vm} runs here and its replica is elsewhere; run this at the replica's site");
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        for (_, path) in &disks {
            std::fs::File::open(path).map_err(|error| Failure::io("read", path, &error))?;
        }
        let seeds: Vec<Seed> =
            disks.into_iter().map(|(disk, path)| Seed { disk, path, format: format.clone() }).collect();
        let name = vm.clone();
        let copied = self.store.run(move |store| store.stage_seed(&name, &seeds)).await?;
        self.events
            .note(Event::new("seeded", "its replica begins with images that were brought").vm(&vm))
            .await;
        let disks: Vec<Value> =
            copied.iter().map(|disk| json!({ "name": disk.name, "size_bytes": disk.size_bytes })).collect();
        Ok(json!({ "vm": vm, "disks": disks }))
    }
}
